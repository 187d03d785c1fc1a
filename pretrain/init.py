"""Encoder weights to go on from: an export of ours, or what others left under timm's or Hugging Face's names."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.data import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import BackboneCard, card_of
from foveal.models.resize import resized
from foveal.models.sincos import sincos_positions
from foveal.models.timm_vit import Encoder
from foveal.models.vit import SizedVit, build_encoder
from foveal.timeouts import answered
from foveal.weights.export import Card, fitting, load_strictly, read_export
from foveal.weights.foreign import heads_beside, read_weights, weights_file

# What an encoder for pretraining has no place for: heads, and decoders of whoever pretrained before.
_UNUSED = (
    "head.",
    "fc_norm.",
    "head_drop.",
    "classifier.",
    "pooler.",
    "decoder",
    "mask_token",
    "embeddings.mask_token",
)
_SAME = 1e-4  # how far a stored table of sines and cosines may be from the formula


@dataclass(frozen=True)
class Start:
    """What a run goes on from. ``grid`` is that of the weights; ``card`` is an export's; the names are the encoder's own."""

    place: Path
    patience: float
    sha256: str
    card: Card | None
    grid: tuple[int, int]
    used: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report in words: which weights were used, which are drawn, which were left."""
        lines = [f"init      {self.place}, {len(self.used)} weights used"]
        lines += [f"          new: {', '.join(self.new)}"] if self.new else []
        return lines + ([f"          unused: {', '.join(self.unused)}"] if self.unused else [])


def started(place: Path, model: SizedVit, data: DataConfig) -> Start:
    """Look at the weights that ``init`` names, and whether they fit an encoder; the encoder is not built.

    Errors: ExportError, one sentence for what does not fit.
    """
    patience = data.patience_seconds
    weights, digest, card = _read(place, patience)
    told = None if card is None else card_of(card.encoder, f"{place}/card.json")
    if isinstance(told, BackboneCard):
        raise ExportError(f"{place} is a {told.timm} of timm as it is; pretraining goes on from an encoder of foveal's")
    if told is None:
        heads = heads_beside(weights_file(place, patience), patience)
        stated = _facts(place, weights) | ({} if heads is None else {"heads": heads})
    else:
        stated = told.tree()
    _check_equal(place, stated, model.tree() | {"channels": data.channels})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = build_encoder(model, image_size=data.image_size, channels=data.channels)
    grid = _grid(place, weights, encoder, model, data) if told is None else told.grid(told.image_size)
    _check_positions(place, weights, model, grid)
    new = _new(weights, model)
    used = fitting(encoder, resized(weights, encoder, model.positions, grid), place, new=new, unused=_UNUSED)
    return Start(
        place,
        patience,
        digest,
        card,
        grid,
        used=tuple(used),
        new=tuple(name for name in encoder.state_dict() if name not in used),
        unused=tuple(name for name in weights if name not in used),
    )


def load_start(encoder: Encoder, start: Start, model: SizedVit) -> None:
    """Put the weights into an encoder. Errors: ExportError where they are no longer those that were looked at."""
    weights, digest, _ = _read(start.place, start.patience)
    if digest != start.sha256:
        raise ExportError(f"{start.place} has changed since the run was planned; start it again")
    weights = resized(weights, encoder, model.positions, start.grid)
    load_strictly(encoder, weights, start.place, new=_new(weights, model), unused=_UNUSED)


def _read(place: Path, patience: float) -> tuple[dict[str, Tensor], str, Card | None]:
    """Weights under timm's names, their file's sha256, and the card where the place is an export."""
    if answered(place, patience, (place / "card.json").exists):
        weights, card = read_export(place, patience)
        return weights, card.sha256, card
    return *read_weights(weights_file(place, patience), patience), None


def _facts(place: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What weights say of the sizes of their encoder."""
    embed = weights.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 4:
        raise ExportError(
            f"{place} has no patch embedding under timm's names or Hugging Face's ViT's (its names begin with "
            f"{', '.join(sorted(weights)[:3])})"
        )
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    width, channels, side, _ = embed.shape
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    return {"patch": side, "channels": channels, "width": width, "depth": len(blocks), "registers": registers}


def _check_equal(place: Path, hers: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, value in ours.items():
        if name in hers and hers[name] != value:
            where = "data.channels" if name == "channels" else f"model.{name}"
            raise ExportError(f"{place} has {name} {hers[name]}, {where} is {value}; they must be equal")


def _grid(
    place: Path, weights: dict[str, Tensor], encoder: Encoder, model: SizedVit, data: DataConfig
) -> tuple[int, int]:
    """(rows, columns) of the patches that foreign weights were trained on: ours, or else a square."""
    ours, table = model.grid(data.image_size), weights.get("pos_embed")
    if model.positions is None or table is None or table.ndim != 3:
        return ours
    length = table.shape[1] - encoder.get_parameter("pos_embed").shape[1] + math.prod(ours)
    side = math.isqrt(max(length, 0))
    if length != math.prod(ours) and (side**2 != length or not side):
        raise ExportError(
            f"{place} has positions of {length} patches, which are neither {ours[0]} x {ours[1]} nor a square"
        )
    return ours if length == math.prod(ours) else (side, side)


def _check_positions(place: Path, weights: dict[str, Tensor], model: SizedVit, grid: tuple[int, int]) -> None:
    """A table that was learned is not to be taken for sines and cosines, or it would be thrown away."""
    table = weights.get("pos_embed")
    length = math.prod(grid)
    # What has another shape is left to the loading to say so.
    if model.positions != "sincos" or table is None or table[:, -length:].shape != (1, length, model.width):
        return
    if (table[0, -length:] - sincos_positions(*grid, model.width)).abs().max() > _SAME:
        raise ExportError(f"{place} has learned positions: set model.positions=learned")


def _new(weights: dict[str, Tensor], model: SizedVit) -> tuple[str, ...]:
    """Prefixes of what may be missing: a last norm, where the mean had its own, and positions that are a formula."""
    pooled = "fc_norm.weight" in weights and "norm.weight" not in weights
    formula = model.positions == "sincos" and "pos_embed" not in weights
    return (("norm.",) if pooled else ()) + (("pos_embed",) if formula else ())
