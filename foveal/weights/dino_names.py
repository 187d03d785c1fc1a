"""timm's names for DINO's weights: those of DINOv2's and DINOv3's own code, and of Hugging Face's DINOv3."""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ExportError

HF_DINOV3_EMBEDDING = "embeddings.patch_embeddings.weight"
DINOV3_REGISTERS = "storage_tokens"
_HF_TOP_LEVEL = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_HF_LAYER = re.compile(r"(?:model\.)?layer\.(\d+)\.(.+)")  # with model. inside of transformers, without in files
_HF_LAYER_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.q_proj": "attn.q_proj",
    "attention.k_proj": "attn.k_proj",
    "attention.v_proj": "attn.v_proj",
    "attention.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
}
# What only DINOv3's pretraining reads, and the rotary positions' periods, which a formula gives.
_DINOV3_UNUSED = ("rope_embed.", "local_cls_norm.")


def rename_dinov2(weights: dict[str, Tensor], model_names: Collection[str]) -> dict[str, Tensor]:
    """Rename what DINOv2 names otherwise than timm: chunks of blocks, the SwiGLU, and registers without positions.

    ``model_names`` are the names of the model that is wanted; some of timm's have blocks in stages, like chunks.
    """
    renamed = {
        name
        if name in model_names
        else re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", _flatten_chunk(name))): value
        for name, value in weights.items()
    }
    registers = renamed.pop("register_tokens", None)
    pos_embed, cls_token = renamed.get("pos_embed"), renamed.get("cls_token")
    if registers is None or not registers.shape[1] or pos_embed is None or cls_token is None:
        return renamed
    # timm's has positions for the patches only: the class token keeps the sum.
    return renamed | {
        "reg_token": registers,
        "cls_token": cls_token + pos_embed[:, :1],
        "pos_embed": pos_embed[:, 1:],
    }


def rename_dinov3(weights: dict[str, Tensor], source: Path, model_names: Collection[str]) -> dict[str, Tensor]:
    """Rename the weights of DINOv3's own code. ``model_names`` are the names of the model that is wanted."""
    masks = {name: value for name, value in weights.items() if name.endswith(".qkv.bias_mask")}
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in masks or name.startswith(_DINOV3_UNUSED):
            continue
        if name.endswith(".qkv.bias"):
            mask = masks.get(f"{name}_mask")  # 0 for the biases of keys
            parts = (value if mask is None else value * mask).chunk(3)
            renamed |= {name.replace("qkv.bias", f"{part}_proj.bias"): parts[i] for i, part in enumerate("qkv")}
            continue
        new_name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        renamed["reg_token" if new_name == DINOV3_REGISTERS else new_name] = value
    return _rename_attention_and_mlp(renamed, source, model_names)


def rename_hugging_face_dinov3(
    weights: dict[str, Tensor], source: Path, model_names: Collection[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of Hugging Face's DINOv3 under timm's names, and the names that are not translated.

    Those outside of layers keep theirs. Raises: ExportError for queries, keys or values that are missing.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in weights.items():
        layer = _HF_LAYER.fullmatch(name)
        if layer is None:
            unknown += [] if name in _HF_TOP_LEVEL else [name]
            renamed[_HF_TOP_LEVEL.get(name, name)] = value
            continue
        stem, _, kind = layer[2].rpartition(".")
        scale = re.fullmatch(r"layer_scale([12])\.lambda1", layer[2])
        if scale is not None:
            renamed[f"blocks.{layer[1]}.gamma_{scale[1]}"] = value
        elif stem in _HF_LAYER_NAMES:
            renamed[f"blocks.{layer[1]}.{_HF_LAYER_NAMES[stem]}.{kind}"] = value
        else:
            unknown.append(name)
    return _rename_attention_and_mlp(renamed, source, model_names), unknown


def _rename_attention_and_mlp(
    weights: dict[str, Tensor], source: Path, model_names: Collection[str]
) -> dict[str, Tensor]:
    """Join queries, keys and values as timm has them, and name an MLP's layers: w1 gates w2, and w3 follows.

    Raises: ExportError, as ``rename_hugging_face_dinov3``.
    """
    is_gated = any(".mlp.w1." in name for name in weights)
    layers = {
        ".mlp.w1.": ".mlp.fc1_g.",
        ".mlp.w2.": ".mlp.fc1_x." if is_gated else ".mlp.fc1.",
        ".mlp.w3.": ".mlp.fc2.",
    }
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.search(r"\.mlp\.w[123]\.", name)
        renamed[name if match is None else name.replace(match[0], layers[match[0]])] = value
    for attention in [name.removesuffix("q_proj.weight") for name in renamed if name.endswith(".attn.q_proj.weight")]:
        parts = [renamed.pop(f"{attention}{part}_proj.weight", None) for part in "qkv"]
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            raise ExportError(
                f"{source} has {len(whole)} of the 3 parts of {attention}qkv.weight; the weights are incomplete"
            )
        renamed[f"{attention}qkv.weight"] = torch.cat(whole)
    return _rename_biases(renamed, model_names)


def _rename_biases(weights: dict[str, Tensor], model_names: Collection[str]) -> dict[str, Tensor]:
    """Name the biases of queries and values as timm does, and drop those of 0 that timm's model does not have.

    timm's models have no bias of keys, and those without _qkvb at the end of their name none of queries and values.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        match = re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.bias", name)
        new_name = name if match is None else f"{match[1]}{match[2]}_bias"
        if match is None or new_name in model_names or value.any():
            renamed[new_name] = value
    return renamed


def _flatten_chunk(name: str) -> str:
    """Return ``blocks.CHUNK.BLOCK.`` as ``blocks.BLOCK.``: chunks count their blocks from the first of all."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
