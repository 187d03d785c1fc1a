"""The directory of a finished pretraining run, without the training: settings, a checkpoint and an export."""

from pathlib import Path
from typing import Any

import torch
from encoders import shaken

from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder, encoder_card
from foveal.optim.optimizers import parameter_groups
from foveal.weights.export import Card, write_export
from pretrain.config import PretrainConfig
from pretrain.model import autoencoder_from_config

STEP = 7


def finished_run(run: Path, *, with_checkpoint: bool = True, **settings: Any) -> Path:
    """A run of a tiny autoencoder whose weights are drawn; ``settings`` are those of pretraining."""
    tree: dict[str, Any] = {
        "epochs": 1,
        "data": {"path": "data/none", "image_size": 16, "channels": 3},
        "batch": {"global_size": 8},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 24, "depth": 2, "heads": 2},
        "decoder": {"width": 16, "depth": 2, "heads": 2},
    }
    cfg = PretrainConfig.from_dict(tree | settings, "a test")
    run.mkdir(parents=True)
    cfg.dump(run / "config.yaml")
    for name in ("science.json", "finished.json"):
        (run / name).write_text("{}")
    torch.manual_seed(0)
    encoder = build_encoder(cfg.model, image_size=cfg.data.image_size, channels=cfg.data.channels)
    model = autoencoder_from_config(encoder, cfg)
    shaken(model)
    if with_checkpoint:
        _save(run, model, cfg)
    card = encoder_card(cfg.model, cfg.data.image_size, cfg.data.channels)
    write_export(run / "export", encoder.state_dict(), Card("pretrain", card, (0.5,) * 3, (0.25,) * 3, step=STEP))
    return run


def _save(run: Path, model: MaskedAutoencoder, cfg: PretrainConfig) -> None:
    alone = World(0, 1, 0, "none", torch.device("cpu"))
    engine = build_engine(
        model,
        parameter_groups(model, cfg.optim),
        cfg.optim,
        EngineConfig(kind="plain"),
        alone,
        microbatch_size=8,
        accumulation_steps=1,
    )
    saver = CheckpointSaver(CheckpointStore(run / "checkpoints", CheckpointConfig(async_save=False), alone, 1, {}))
    assert saver.save(engine, TrainState(STEP, 0.0, 1, "plain", {})) is not None
