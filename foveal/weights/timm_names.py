"""timm's names for weights of others: wrappers' prefixes taken off, Hugging Face's and DINOv2's names translated."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foveal.errors import ExportError

# Weights beside an encoder that every reader leaves out: poolers, and what only pretraining uses.
UNUSED_PREFIXES = ("pooler.", "decoder", "mask_token")
# Heads, as they stand beside an encoder with a prefix.
_HEADS = re.compile(r"(head|head_dist|fc_norm|classifier|cls_classifier|distillation_classifier)\.(weight|bias)")
_TIMM_EMBEDDING = "patch_embed.proj.weight"
_HF_EMBEDDING = "embeddings.patch_embeddings.projection.weight"
# Hugging Face's names after the model's own prefix, before transformers 5 and since; files of both hold the older ones.
_HF_TOP_LEVEL = {
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
_HF_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")
_HF_LAYER_NAMES = {
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
_HF_LAYER_PARAMETERS = {
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "lambda_1": "gamma_1",
    "lambda_2": "gamma_2",
}
# Parts that timm has in one matrix: queries, keys and values; the gate of a SwiGLU and what it gates.
_HF_PARTS = {
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
# Modules that torch puts around others (FSDP, activation checkpointing, compile), which stand anywhere in a name.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_orig_mod)\.")
_ADAPTERS = re.compile(r"(?<![^.])lora_|\.base_layer\.(weight|bias)$")  # PEFT's; timm's DLA has base_layer.0.weight
# Names inside the encoders of other libraries that are not translated: CLIP, SigLIP, DINOv3, ConvNeXt, Swin, ResNet.
_OTHER_LIBRARIES = re.compile(r"(^|\.)(embeddings|embedder|class_embedding|visual|vision_model)(\.|$)")


@dataclass(frozen=True)
class RenamedWeights:
    """Weights under timm's names, sentences about what was taken off or left out, and whose names they had."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    is_hugging_face: bool


def rename_to_timm(weights: dict[str, Tensor], source: Path, model_names: Collection[str]) -> RenamedWeights:
    """Return weights under timm's names: those of timm, of Hugging Face's ViT family, of DINOv2, with any prefix.

    The names of torch's wrappers are taken off wherever they stand. A prefix that all names share is taken off, then the
    one of the encoder, which its patch embedding shows.
    ``model_names`` are the names of the model that is wanted; some of timm's models have such a prefix themselves.
    Raises: ExportError for two encoders in one file, for adapters beside the weights, and for names of others that are
    not translated.
    """
    notes: list[str] = []
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}  # torch's AveragedModel
    adapters = [name for name in weights if _ADAPTERS.search(name)]
    if adapters:
        raise ExportError(
            f"{source} has low-rank adapters that are not merged into the weights ({_shorten(adapters)}); merge them, for "
            f"example by PEFT's merge_and_unload, and save the model again"
        )
    weights, wrappers = _strip_wrappers(weights, source)
    if wrappers:
        notes.append(f"{', '.join(wrappers)} taken off names")
    weights, shared = _strip_shared_prefix(weights, model_names)
    weights, own, left_out = _strip_encoder_prefix(weights, source, model_names)
    is_hugging_face = _HF_EMBEDDING in weights
    if shared:
        notes.append(f"prefix {shared} taken off")
    if own and not (is_hugging_face and not left_out):
        notes.append(f"names under {own} are the encoder's")
    if left_out:
        notes.append(f"{len(left_out)} other weights left out ({_shorten(left_out)})")
    if is_hugging_face:
        weights = _rename_hugging_face(weights, source)
    elif _TIMM_EMBEDDING not in weights:
        unknown = [name for name in weights if _OTHER_LIBRARIES.search(name)]
        others = [name for name in weights if name not in model_names]
        if not unknown and _TIMM_EMBEDDING in model_names and 2 * len(others) > len(weights):
            unknown = others
        if unknown:
            raise _unknown_names_error(source, unknown)
    return RenamedWeights(_rename_dinov2(weights), tuple(notes), is_hugging_face)


def _strip_wrappers(weights: dict[str, Tensor], source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Take torch's wrappers off all names; return their names too. Raises: ExportError if two names become one."""
    stripped: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = _WRAPPERS.sub("", name)
        if short in stripped:
            raise ExportError(f"{source} has {short} twice, also as {name}; write the weights that are meant alone")
        stripped[short] = value
    return stripped, sorted({found for name in weights for found in _WRAPPERS.findall(name)})


def _strip_shared_prefix(weights: dict[str, Tensor], model_names: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """Take off the components that all names share: ``module.``, ``_orig_mod.``, ``model.`` and others, also nested."""
    stripped = ""
    while True:
        first = {name.partition(".")[0] for name in weights}
        is_the_model = 2 * sum(name in model_names for name in weights) >= len(weights)
        if is_the_model or len(first) != 1 or not all("." in name for name in weights):
            return weights, stripped
        prefix = f"{first.pop()}."
        stripped += prefix
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}


def _strip_encoder_prefix(
    weights: dict[str, Tensor], source: Path, model_names: Collection[str]
) -> tuple[dict[str, Tensor], str, list[str]]:
    """Return the encoder's weights without its prefix, the prefix, and the names of other modules' weights.

    A head beside the encoder stays if nothing else stands there, because a module between the two would be lost.
    Raises: ExportError for two encoders.
    """
    prefixes = _find_encoder_prefixes(weights, model_names)
    if len(prefixes) > 1:
        names = ", ".join(prefix or "names without a prefix" for prefix in prefixes)
        raise ExportError(
            f"{source} holds {len(prefixes)} encoders ({names}); write the weights of the one that is meant into a file "
            f"of their own"
        )
    prefix = prefixes[0] if prefixes else ""
    if not prefix:
        return weights, "", []
    encoder = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    beside = [name for name in weights if not name.startswith((prefix, *UNUSED_PREFIXES))]
    kept = {name for name in weights if not name.startswith(prefix)} - set(beside)
    if all(_HEADS.fullmatch(name) for name in beside):
        kept, beside = kept | set(beside), []
    return encoder | {name: weights[name] for name in weights if name in kept and name not in encoder}, prefix, beside


def _find_encoder_prefixes(weights: dict[str, Tensor], model_names: Collection[str]) -> list[str]:
    """Return the prefixes before a patch embedding, and those under which at least half of the model's names stand."""
    prefixes = {
        name.removesuffix(embedding)
        for embedding in (_TIMM_EMBEDDING, _HF_EMBEDDING)
        for name in weights
        if f".{name}".endswith(f".{embedding}") and (name == embedding or name not in model_names)
    }
    first = next((name for name in model_names if name.endswith(".weight")), None)
    if first is not None and first not in (_TIMM_EMBEDDING, _HF_EMBEDDING):
        candidates = {name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")}
        prefixes |= {
            prefix
            for prefix in candidates
            if 2 * sum(prefix + name in weights for name in model_names) >= len(model_names)
        }
    return sorted(prefixes)


def _rename_hugging_face(weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Rename the weights of Hugging Face's ViT, ViTMAE, DeiT, DINOv2, ViT-MSN, I-JEPA and BEiT."""
    weights = {name: value for name, value in weights.items() if not name.endswith("relative_position_index")}
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    unknown: list[str] = []
    for name, value in weights.items():
        layer = _HF_LAYER.fullmatch(name)
        if layer is not None:
            new_name, part = _translate_in_layer(layer[2])
            if not new_name:
                unknown.append(name)
            elif part is None:
                renamed[f"blocks.{layer[1]}.{new_name}"] = value
            else:
                parts.setdefault(f"blocks.{layer[1]}.{new_name}", {})[part] = value
        else:
            if name not in _HF_TOP_LEVEL and not _HEADS.fullmatch(name) and not name.startswith(UNUSED_PREFIXES):
                unknown.append(name)
            renamed[_HF_TOP_LEVEL.get(name, name)] = value
    if unknown:
        raise _unknown_names_error(source, unknown)
    for name, by_number in parts.items():
        renamed |= _join_parts(name, by_number, source)
    return renamed


def _translate_in_layer(name: str) -> tuple[str, int | None]:
    """Return timm's name inside a block, or that of a matrix of parts and the part's number; "" for unknown names."""
    if name in _HF_LAYER_PARAMETERS:
        return _HF_LAYER_PARAMETERS[name], None
    if name.endswith(_BIAS_TABLE):
        return "attn.relative_position_bias_table", None
    stem, _, kind = name.rpartition(".")
    if stem in _HF_LAYER_NAMES:
        return f"{_HF_LAYER_NAMES[stem]}.{kind}", None
    whole, part = _HF_PARTS.get(stem.rpartition(".")[2], ("", None))
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


def _rename_dinov2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what DINOv2 names otherwise than timm: chunks of blocks, the SwiGLU, and registers without positions."""
    renamed = {
        re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", _flatten_chunk(name))): value
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


def _flatten_chunk(name: str) -> str:
    """Return ``blocks.CHUNK.BLOCK.`` as ``blocks.BLOCK.``: chunks count their blocks from the first of all."""
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _unknown_names_error(source: Path, names: Sequence[str]) -> ExportError:
    return ExportError(
        f"{source} has names that are neither timm's of this model nor translated ({_shorten(names)}); translated are "
        f"those of Hugging Face's ViT, ViTMAE, DeiT, DINOv2 (also with registers), ViT-MSN, I-JEPA and BEiT: for other "
        f"models, such as CLIP, SigLIP, DINOv3, Swin and ConvNeXt, and for other libraries, such as torchvision and "
        f"mmpretrain, give the weights under timm's names"
    )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
