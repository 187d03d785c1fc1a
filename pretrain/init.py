"""Initial weights: a foveal export, or foreign weights under timm's, Hugging Face's or DINO's names."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.models.backbone import BackboneCard, parse_encoder_card
from foveal.models.config import DecoderConfig, ResolvedVitConfig
from foveal.models.resize import resize_position_embeddings
from foveal.models.timm_vit import Encoder
from foveal.models.vit import build_encoder
from foveal.timeouts import read_with_timeout
from foveal.weights.decoder_names import DECODER_PREFIXES
from foveal.weights.export import Card, check_and_select_weights, check_finite, load_weights_strict, read_export
from foveal.weights.foreign import find_weights_file, read_weights_as_timm
from foveal.weights.foreign_card import check_hub_config, infer_foreign_grid
from foveal.weights.hub_files import HubFiles, read_hub_files
from foveal.weights.position_grid import is_sincos_table
from foveal.weights.stated_architecture import check_stated_architecture
from foveal.weights.timm_names import UNUSED_PREFIXES
from pretrain.init_decoder import inspect_init_decoder

# Weights that a pretraining encoder does not have: heads, and decoders of an earlier pretraining.
_IGNORED_PREFIXES = ("head.", "fc_norm.", "head_drop.", "classifier.", *UNUSED_PREFIXES)


@dataclass(frozen=True)
class InitSource:
    """Initial weights of a run, and which of them an encoder uses.

    ``patch_grid`` is (rows, columns) in the source; ``card`` is None for foreign weights; keys are timm's names.
    ``notes`` say in words what was renamed or left out.
    """

    path: Path
    read_timeout_seconds: float
    sha256: str
    card: Card | None
    patch_grid: tuple[int, int]
    loaded_keys: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def summary_lines(self) -> list[str]:
        """Return the report: the number of weights used, and the names that are new or unused."""
        lines = [f"init      {self.path}, {len(self.loaded_keys)} weights used"]
        lines += [f"          {note}" for note in self.notes]
        lines += [f"          new: {', '.join(self.missing_keys)}"] if self.missing_keys else []
        return lines + ([f"          unused: {', '.join(self.unexpected_keys)}"] if self.unexpected_keys else [])


def inspect_init_weights(
    path: Path, model: ResolvedVitConfig, data: DataConfig, decoder: DecoderConfig | None = None
) -> InitSource:
    """Check weights against an encoder, on the meta device, and return which are used.

    ``decoder``: the settings of a decoder that starts from the weights too; None: it is drawn.
    Raises: ExportError if the weights do not fit.
    """
    timeout_seconds = data.stall_timeout_seconds
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        encoder = build_encoder(model, image_size=data.image_size, channels=data.channels)
    weights, digest, card, notes = _read_init_weights(path, encoder, timeout_seconds)
    source_card = None if card is None else parse_encoder_card(card.encoder, f"{path}/card.json")
    if isinstance(source_card, BackboneCard):
        raise ExportError(f"{path} is the timm backbone {source_card.timm}; pretraining needs a foveal encoder")
    if source_card is not None and decoder is not None:
        raise ExportError(
            f"{path} is an export, which holds no decoder: leave init_decoder out, or go on with the run itself (run.fork)"
        )
    if source_card is None:
        hub = read_hub_files(find_weights_file(path, timeout_seconds), timeout_seconds)
        source_sizes = _infer_sizes(path, weights) | ({} if hub.num_heads is None else {"heads": hub.num_heads})
        _check_equal(path, source_sizes, model.to_dict() | {"channels": data.channels})
        notes += tuple(check_hub_config(hub, encoder, model.name, data))
        if data.weights_version > 1:
            notes += tuple(check_stated_architecture(hub, encoder, model.name))
        patch_grid = _infer_patch_grid(path, weights, encoder, model, data, hub)
        if decoder is not None:
            arguments = (model, data.channels, patch_grid, hub)
            notes += (inspect_init_decoder(path, weights, encoder, decoder, *arguments),)
    else:
        _check_equal(path, source_card.to_dict(), model.to_dict() | {"channels": data.channels})
        patch_grid = source_card.patch_grid(source_card.image_size)
    _check_positions(path, weights, model, patch_grid)
    used = check_and_select_weights(
        encoder,
        resize_position_embeddings(weights, encoder, model.positions, patch_grid),
        path,
        new_module_prefixes=_allowed_missing_prefixes(weights, model),
        unused_prefixes=_IGNORED_PREFIXES,
    )
    return InitSource(
        path,
        timeout_seconds,
        digest,
        card,
        patch_grid,
        loaded_keys=tuple(used),
        missing_keys=tuple(name for name in encoder.state_dict() if name not in used),
        unexpected_keys=tuple(
            name for name in weights if name not in used and not (decoder and name.startswith(DECODER_PREFIXES))
        ),
        notes=notes,
    )


def load_init_weights(encoder: Encoder, source: InitSource, model: ResolvedVitConfig) -> dict[str, Tensor]:
    """Load the weights into an encoder, and return all weights of the source (``load_init_decoder``).

    Raises: ExportError if the file has changed since the plan.
    """
    weights, digest, _, _ = _read_init_weights(source.path, encoder, source.read_timeout_seconds)
    if digest != source.sha256:
        raise ExportError(f"{source.path} has changed since the run was planned; start the run again")
    resized = resize_position_embeddings(weights, encoder, model.positions, source.patch_grid)
    load_weights_strict(
        encoder,
        resized,
        source.path,
        new_module_prefixes=_allowed_missing_prefixes(resized, model),
        unused_prefixes=_IGNORED_PREFIXES,
    )
    return weights


def _read_init_weights(
    path: Path, encoder: Encoder, timeout_seconds: float
) -> tuple[dict[str, Tensor], str, Card | None, tuple[str, ...]]:
    """Return weights under timm's names, their file's sha256, the card if the path is an export, and notes if not."""
    if read_with_timeout(path, timeout_seconds, (path / "card.json").exists):
        weights, card = read_export(path, timeout_seconds)
        return weights, card.sha256, card, ()
    file = find_weights_file(path, timeout_seconds)
    foreign = read_weights_as_timm(file, encoder.state_dict(), timeout_seconds)
    used = {name: value for name, value in foreign.tensors.items() if not name.startswith(_IGNORED_PREFIXES)}
    check_finite(used, file)
    return foreign.tensors, foreign.sha256, None, foreign.notes


def _infer_sizes(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the encoder's sizes from the shapes of its weights. Raises: ExportError without a patch embedding."""
    embed = weights.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 4:
        raise ExportError(
            f"{path} has no patch embedding under timm's or Hugging Face's ViT names (its first names are "
            f"{', '.join(sorted(weights)[:3])})"
        )
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    width, channels, patch_size, _ = embed.shape
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    return {"patch": patch_size, "channels": channels, "width": width, "depth": len(blocks), "registers": registers}


def _check_equal(path: Path, source_sizes: dict[str, Any], model_sizes: dict[str, Any]) -> None:
    for name, value in model_sizes.items():
        if name in source_sizes and source_sizes[name] != value:
            setting = "data.channels" if name == "channels" else f"model.{name}"
            raise ExportError(f"{path} has {name} {source_sizes[name]}, {setting} is {value}; they must be equal")


def _infer_patch_grid(
    path: Path,
    weights: dict[str, Tensor],
    encoder: Encoder,
    model: ResolvedVitConfig,
    data: DataConfig,
    hub: HubFiles,
) -> tuple[int, int]:
    """Return (rows, columns) of foreign weights' position table; the model's grid if there is no table."""
    model_grid, table = model.patch_grid(data.image_size), weights.get("pos_embed")
    if model.positions is None or table is None or table.ndim != 3:
        return model_grid
    num_prefix_rows = encoder.get_parameter("pos_embed").shape[1] - math.prod(model_grid)
    version = data.weights_version
    return infer_foreign_grid(table, num_prefix_rows, model.patch, model_grid, model.name, hub, version, path)


def _check_positions(path: Path, weights: dict[str, Tensor], model: ResolvedVitConfig, grid: tuple[int, int]) -> None:
    """Raise: ExportError if positions=sincos would discard a learned table."""
    table = weights.get("pos_embed")
    length = math.prod(grid)
    # A table of another shape is refused when the weights are selected.
    if model.positions != "sincos" or table is None or table[:, -length:].shape != (1, length, model.width):
        return
    if not is_sincos_table(table, grid):
        raise ExportError(f"{path} has learned positions: set model.positions=learned")


def _allowed_missing_prefixes(weights: dict[str, Tensor], model: ResolvedVitConfig) -> tuple[str, ...]:
    """Return prefixes that may be missing: the last norm if the source has fc_norm instead, and sincos positions."""
    pooled = "fc_norm.weight" in weights and "norm.weight" not in weights
    formula = model.positions == "sincos" and "pos_embed" not in weights
    return (("norm.",) if pooled else ()) + (("pos_embed",) if formula else ())
