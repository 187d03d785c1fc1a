"""The masked autoencoder of a pretraining run, decoder included: from its settings and its newest checkpoint."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveal.checkpoint.chunk_index import load_chunks
from foveal.checkpoint.chunks import replicated_chunk
from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World
from foveal.errors import CheckpointError, ExportError
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder
from foveal.training.lease import read_relevant_start_steps


@dataclass(frozen=True)
class Autoencoder:
    """A masked autoencoder of a step, in evaluation mode on the CPU, and the settings of its masks and targets."""

    model: MaskedAutoencoder
    step: int
    mask_ratio: float
    norm_pix: bool
    predicts_features: bool


def load_autoencoder(run: Path) -> Autoencoder:
    """Return the autoencoder of a pretraining run. Raises: ExportError without a checkpoint; CheckpointError; ConfigError."""
    cfg = _load_config(run)
    encoder = build_encoder(cfg.model, image_size=cfg.data.image_size, channels=cfg.data.channels)
    model: MaskedAutoencoder = importlib.import_module("pretrain.model").autoencoder_from_config(encoder, cfg)
    folder, step = _find_checkpoint(run)
    chunks = [replicated_chunk(name, {"weight": value}, 0, 1) for name, value in model.state_dict().items()]
    load_chunks(folder, chunks, weights_only=True)
    return Autoencoder(model.eval(), step, cfg.mask_ratio, cfg.norm_pix, cfg.target == "features")


def _load_config(run: Path) -> Any:
    """Return the run's settings; stages import foveal and never the reverse, so the import is dynamic."""
    config_class: Any = importlib.import_module("pretrain.config").PretrainConfig
    file = run / "config.yaml"
    if not file.exists():
        raise ExportError(
            f"{run} has no config.yaml, which has the decoder's sizes; restore it, or give the export alone"
        )
    return config_class.load(file, on_warning=lambda _text: None)


def _find_checkpoint(run: Path) -> tuple[Path, int]:
    alone = World(0, 1, 0, "none", torch.device("cpu"))
    starts = read_relevant_start_steps(run)
    store = CheckpointStore(run / "checkpoints", CheckpointConfig(), alone, 0, starts, read_only=True)
    try:
        latest = store.find_latest_valid()
        reason = "has no checkpoint"
    except CheckpointError:  # its advice is for a run that is to go on
        latest, reason = None, "has no checkpoint that is whole"
    if latest is None:
        raise ExportError(
            f"{run} {reason}, and only a checkpoint has the decoder; give its export for the encoder alone"
        )
    return latest[0], latest[1].step
