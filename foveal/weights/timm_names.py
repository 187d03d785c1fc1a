"""timm's names for weights of others: wrappers' prefixes taken off, other libraries' names translated."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from foveal.errors import ExportError
from foveal.weights.dino_names import (
    DINOV3_REGISTERS,
    HF_DINOV3_EMBEDDING,
    rename_dinov2,
    rename_dinov3,
    rename_hugging_face_dinov3,
)
from foveal.weights.hugging_face_names import HF_EMBEDDING, rename_hugging_face
from foveal.weights.weight_lists import list_weights

# Weights beside an encoder that every reader leaves out: poolers, and what only pretraining uses.
UNUSED_PREFIXES = ("pooler.", "decoder", "mask_token")
# Heads, as they stand beside an encoder with a prefix.
_HEADS = re.compile(r"(head|head_dist|fc_norm|classifier|cls_classifier|distillation_classifier)\.(weight|bias)")
_TIMM_EMBEDDING = "patch_embed.proj.weight"
_EMBEDDINGS = (_TIMM_EMBEDDING, HF_EMBEDDING, HF_DINOV3_EMBEDDING)
# Modules that torch puts around others (FSDP, activation checkpointing, compile), which stand anywhere in a name.
_WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_orig_mod)\.")
_ADAPTERS = re.compile(r"(?<![^.])lora_|\.base_layer\.(weight|bias)$")  # PEFT's; timm's DLA has base_layer.0.weight
# Names inside the encoders of other libraries that are not translated: CLIP, SigLIP, ConvNeXt, Swin, ResNet.
_OTHER_LIBRARIES = re.compile(r"(^|\.)(embeddings|embedder|class_embedding|visual|vision_model)(\.|$)")


@dataclass(frozen=True)
class RenamedWeights:
    """Weights under timm's names, sentences about what was taken off or left out, and whose names they had."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    is_hugging_face: bool


def rename_to_timm(weights: dict[str, Tensor], source: Path, model_names: Collection[str]) -> RenamedWeights:
    """Return weights under timm's names: those of timm, of Hugging Face's ViT family, of DINO, with any prefix.

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
    is_hugging_face = HF_EMBEDDING in weights or HF_DINOV3_EMBEDDING in weights
    if shared:
        notes.append(f"prefix {shared} taken off")
    if own and not (is_hugging_face and not left_out):
        notes.append(f"names under {own} are the encoder's")
    if left_out:
        notes.append(f"{len(left_out)} other weights left out ({_shorten(left_out)})")
    return RenamedWeights(_rename_by_origin(weights, source, model_names), tuple(notes), is_hugging_face)


def _rename_by_origin(weights: dict[str, Tensor], source: Path, model_names: Collection[str]) -> dict[str, Tensor]:
    """Translate the names of the library that a patch embedding or registers show. Raises: ExportError for others."""
    unknown: list[str] = []
    renamed = weights
    if HF_EMBEDDING in weights:
        renamed, unknown = rename_hugging_face(weights, source)
    elif HF_DINOV3_EMBEDDING in weights:
        renamed, unknown = rename_hugging_face_dinov3(weights, source, model_names)
    elif DINOV3_REGISTERS in weights and _TIMM_EMBEDDING in weights:
        return rename_dinov3(weights, source, model_names)
    elif _TIMM_EMBEDDING not in weights:
        unknown = [name for name in weights if _OTHER_LIBRARIES.search(name)]
        others = [name for name in weights if name not in model_names]
        if not unknown and _TIMM_EMBEDDING in model_names and 2 * len(others) > len(weights):
            unknown = others
    unknown = [name for name in unknown if not (_HEADS.fullmatch(name) or name.startswith(UNUSED_PREFIXES))]
    if unknown:
        raise _unknown_names_error(source, {name: weights[name] for name in unknown})
    return rename_dinov2(renamed, model_names)


def holds_encoder(weights: dict[str, Tensor], model_names: Collection[str]) -> bool:
    """Return whether an encoder stands in the weights, at any prefix: a patch embedding, or half of the model's names."""
    return bool(
        _find_encoder_prefixes({_WRAPPERS.sub("", name): value for name, value in weights.items()}, model_names)
    )


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
        for embedding in _EMBEDDINGS
        for name in weights
        if f".{name}".endswith(f".{embedding}") and (name == embedding or name not in model_names)
    }
    first = next((name for name in model_names if name.endswith(".weight")), None)
    if first is not None and first not in _EMBEDDINGS:
        candidates = {name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")}
        prefixes |= {
            prefix
            for prefix in candidates
            if 2 * sum(prefix + name in weights for name in model_names) >= len(model_names)
        }
    return sorted(prefixes)


def _unknown_names_error(source: Path, weights: Mapping[str, Tensor]) -> ExportError:
    return ExportError(
        f"{source} has names that are neither timm's of this model nor translated ({list_weights(weights)}); translated "
        f"are those of Hugging Face's ViT, ViTMAE, DeiT, DINOv2 and DINOv3 (also with registers), ViT-MSN, I-JEPA and "
        f"BEiT: for other models, such as CLIP, SigLIP, Swin and ConvNeXt, and for other libraries, such as torchvision "
        f"and mmpretrain, give the weights under timm's names"
    )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
