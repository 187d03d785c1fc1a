"""timm's names for the weights of Hugging Face's ViT family: ViT, ViTMAE, DeiT, DINOv2, ViT-MSN, I-JEPA and BEiT."""

import re
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ExportError

HF_EMBEDDING = "embeddings.patch_embeddings.projection.weight"
# Hugging Face's names after the model's own prefix, before transformers 5 and since; files of both hold the older ones.
_TOP_LEVEL = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "pooler.layernorm.weight": "fc_norm.weight",  # BEiT's, behind the mean of the patches
    "pooler.layernorm.bias": "fc_norm.bias",
}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")
_LAYER_NAMES = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "mlp.weights_in": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_out": "mlp.fc2",
    "mlp.down_proj": "mlp.fc2",
    "layernorm_before": "norm1",
    "norm1": "norm1",
    "layernorm_after": "norm2",
    "norm2": "norm2",
}
_LAYER_PARAMETERS = {
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "lambda_1": "gamma_1",
    "lambda_2": "gamma_2",
}
# Parts that timm has in one matrix: queries, keys and values; the gate of a SwiGLU and what it gates.
_PARTS = {
    "query": ("attn.qkv", 0),
    "q_proj": ("attn.qkv", 0),
    "key": ("attn.qkv", 1),
    "k_proj": ("attn.qkv", 1),
    "value": ("attn.qkv", 2),
    "v_proj": ("attn.qkv", 2),
    "gate_proj": ("mlp.fc1", 0),
    "up_proj": ("mlp.fc1", 1),
}
_NUM_PARTS = {"attn.qkv": 3, "mlp.fc1": 2}
_BIAS_TABLE = "relative_position_bias.relative_position_bias_table"


def rename_hugging_face(weights: dict[str, Tensor], source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights under timm's names, and the names that are not translated; these keep theirs outside of layers.

    Raises: ExportError for a part of an attention or of a SwiGLU that is missing.
    """
    weights = {name: value for name, value in weights.items() if not name.endswith("relative_position_index")}
    outside = {name: value for name, value in weights.items() if _LAYER.fullmatch(name) is None}
    renamed = {_TOP_LEVEL.get(name, name): value for name, value in outside.items()}
    layers, unknown = rename_hugging_face_layers(weights, _LAYER, source)
    return renamed | layers, [name for name in outside if name not in _TOP_LEVEL] + unknown


def rename_hugging_face_layers(
    weights: dict[str, Tensor], layer: re.Pattern[str], source: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of layers as ``blocks.N.``, and the names inside of layers that are not translated.

    ``layer`` matches names of layers: its groups are the layer's number and the name inside it.
    Raises: ExportError, as ``rename_hugging_face``.
    """
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown: list[str] = []
    for name, value in weights.items():
        match = layer.fullmatch(name)
        if match is None:
            continue
        new_name, part = _translate_in_layer(match[2])
        if not new_name:
            unknown.append(name)
        elif part is None:
            renamed[f"blocks.{match[1]}.{new_name}"] = value
        else:
            parts.setdefault(f"blocks.{match[1]}.{new_name}", {})[part] = value
    for name, by_number in parts.items():
        renamed |= _join_parts(name, by_number, source)
    return renamed, unknown


def _translate_in_layer(name: str) -> tuple[str, int | None]:
    """Return timm's name inside a block, or that of a matrix of parts and the part's number; "" for unknown names."""
    if name in _LAYER_PARAMETERS:
        return _LAYER_PARAMETERS[name], None
    if name.endswith(_BIAS_TABLE):
        return "attn.relative_position_bias_table", None
    stem, _, kind = name.rpartition(".")
    if stem in _LAYER_NAMES:
        return f"{_LAYER_NAMES[stem]}.{kind}", None
    whole, part = _PARTS.get(stem.rpartition(".")[2], ("", None))
    return f"{whole}.{kind}" if whole else "", part


def _join_parts(name: str, by_number: dict[int, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the parts of ``name`` as one tensor; BEiT's keys have no bias, which timm has in two parts."""
    if name.endswith("attn.qkv.bias") and by_number.keys() == {0, 2}:
        return {name.replace("qkv.bias", "q_bias"): by_number[0], name.replace("qkv.bias", "v_bias"): by_number[2]}
    num_parts = next(number for whole, number in _NUM_PARTS.items() if f".{whole}." in name)
    if len(by_number) < num_parts:
        raise ExportError(
            f"{source} has {len(by_number)} of the {num_parts} parts of {name}; the weights are incomplete"
        )
    return {name: torch.cat([by_number[number] for number in range(num_parts)])}
