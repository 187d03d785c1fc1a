"""Encoder weights to go on from: an export of ours, or what others left under timm's or Hugging Face's names."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.data import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import BackboneCard, parse_encoder_card
from foveal.models.resize import resize_weights
from foveal.models.sincos import sincos_positions
from foveal.models.timm_vit import Encoder
from foveal.models.vit import ResolvedVitConfig, build_encoder
from foveal.timeouts import read_with_timeout
from foveal.weights.export import Card, load_weights_strict, read_export, select_matching_weights
from foveal.weights.foreign import find_weights_file, read_num_heads, read_weights_as_timm

# What an encoder for pretraining has no place for: heads, and decoders of whoever pretrained before.
_IGNORED_PREFIXES = (
    "head.",
    "fc_norm.",
    "head_drop.",
    "classifier.",
    "pooler.",
    "decoder",
    "mask_token",
    "embeddings.mask_token",
)
_POSITION_TOLERANCE = 1e-4  # how far a stored table of sines and cosines may be from the formula


@dataclass(frozen=True)
class InitSource:
    """What a run goes on from. ``grid`` is that of the weights; ``card`` is an export's; the names are the encoder's own."""

    path: Path
    timeout_seconds: float
    sha256: str
    card: Card | None
    patch_grid: tuple[int, int]
    loaded_keys: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]

    def summary_lines(self) -> list[str]:
        """The report in words: which weights were used, which are drawn, which were left."""
        lines = [f"init      {self.path}, {len(self.loaded_keys)} weights used"]
        lines += [f"          new: {', '.join(self.missing_keys)}"] if self.missing_keys else []
        return lines + ([f"          unused: {', '.join(self.unexpected_keys)}"] if self.unexpected_keys else [])


def inspect_init_weights(path: Path, model: ResolvedVitConfig, data: DataConfig) -> InitSource:
    """Look at the weights that ``init`` names, and whether they fit an encoder; the encoder is not built.

    Raises: ExportError, one sentence for what does not fit.
    """
    patience = data.patience_seconds
    weights, digest, card = _read_init_weights(path, patience)
    told = None if card is None else parse_encoder_card(card.encoder, f"{path}/card.json")
    if isinstance(told, BackboneCard):
        raise ExportError(f"{path} is a {told.timm} of timm as it is; pretraining goes on from an encoder of foveal's")
    if told is None:
        heads = read_num_heads(find_weights_file(path, patience), patience)
        stated = _infer_sizes(path, weights) | ({} if heads is None else {"heads": heads})
    else:
        stated = told.to_dict()
    _check_equal(path, stated, model.to_dict() | {"channels": data.channels})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = build_encoder(model, image_size=data.image_size, channels=data.channels)
    grid = _infer_patch_grid(path, weights, encoder, model, data) if told is None else told.patch_grid(told.image_size)
    _check_positions(path, weights, model, grid)
    new = _allowed_missing_prefixes(weights, model)
    used = select_matching_weights(
        encoder,
        resize_weights(weights, encoder, model.positions, grid),
        path,
        new_prefixes=new,
        unused_prefixes=_IGNORED_PREFIXES,
    )
    return InitSource(
        path,
        patience,
        digest,
        card,
        grid,
        loaded_keys=tuple(used),
        missing_keys=tuple(name for name in encoder.state_dict() if name not in used),
        unexpected_keys=tuple(name for name in weights if name not in used),
    )


def load_init_weights(encoder: Encoder, source: InitSource, model: ResolvedVitConfig) -> None:
    """Put the weights into an encoder. Raises: ExportError where they are no longer those that were looked at."""
    weights, digest, _ = _read_init_weights(source.path, source.timeout_seconds)
    if digest != source.sha256:
        raise ExportError(f"{source.path} has changed since the run was planned; start it again")
    weights = resize_weights(weights, encoder, model.positions, source.patch_grid)
    load_weights_strict(
        encoder,
        weights,
        source.path,
        new_prefixes=_allowed_missing_prefixes(weights, model),
        unused_prefixes=_IGNORED_PREFIXES,
    )


def _read_init_weights(path: Path, timeout_seconds: float) -> tuple[dict[str, Tensor], str, Card | None]:
    """Weights under timm's names, their file's sha256, and the card where the place is an export."""
    if read_with_timeout(path, timeout_seconds, (path / "card.json").exists):
        weights, card = read_export(path, timeout_seconds)
        return weights, card.sha256, card
    return *read_weights_as_timm(find_weights_file(path, timeout_seconds), timeout_seconds), None


def _infer_sizes(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What weights say of the sizes of their encoder."""
    embed = weights.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 4:
        raise ExportError(
            f"{path} has no patch embedding under timm's names or Hugging Face's ViT's (its names begin with "
            f"{', '.join(sorted(weights)[:3])})"
        )
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    width, channels, side, _ = embed.shape
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    return {"patch": side, "channels": channels, "width": width, "depth": len(blocks), "registers": registers}


def _check_equal(path: Path, found_sizes: dict[str, Any], model_sizes: dict[str, Any]) -> None:
    for name, value in model_sizes.items():
        if name in found_sizes and found_sizes[name] != value:
            where = "data.channels" if name == "channels" else f"model.{name}"
            raise ExportError(f"{path} has {name} {found_sizes[name]}, {where} is {value}; they must be equal")


def _infer_patch_grid(
    path: Path, weights: dict[str, Tensor], encoder: Encoder, model: ResolvedVitConfig, data: DataConfig
) -> tuple[int, int]:
    """(rows, columns) of the patches that foreign weights were trained on: ours, or else a square."""
    ours, table = model.patch_grid(data.image_size), weights.get("pos_embed")
    if model.positions is None or table is None or table.ndim != 3:
        return ours
    length = table.shape[1] - encoder.get_parameter("pos_embed").shape[1] + math.prod(ours)
    side = math.isqrt(max(length, 0))
    if length != math.prod(ours) and (side**2 != length or not side):
        raise ExportError(
            f"{path} has positions of {length} patches, which are neither {ours[0]} x {ours[1]} nor a square"
        )
    return ours if length == math.prod(ours) else (side, side)


def _check_positions(path: Path, weights: dict[str, Tensor], model: ResolvedVitConfig, grid: tuple[int, int]) -> None:
    """A table that was learned is not to be taken for sines and cosines, or it would be thrown away."""
    table = weights.get("pos_embed")
    length = math.prod(grid)
    # What has another shape is left to the loading to say so.
    if model.positions != "sincos" or table is None or table[:, -length:].shape != (1, length, model.width):
        return
    if (table[0, -length:] - sincos_positions(*grid, model.width)).abs().max() > _POSITION_TOLERANCE:
        raise ExportError(f"{path} has learned positions: set model.positions=learned")


def _allowed_missing_prefixes(weights: dict[str, Tensor], model: ResolvedVitConfig) -> tuple[str, ...]:
    """Prefixes of what may be missing: a last norm, where the mean had its own, and positions that are a formula."""
    pooled = "fc_norm.weight" in weights and "norm.weight" not in weights
    formula = model.positions == "sincos" and "pos_embed" not in weights
    return (("norm.",) if pooled else ()) + (("pos_embed",) if formula else ())
