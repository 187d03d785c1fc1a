"""Pictures of reconstructions: the same images and masks at every step and on any number of ranks, no generator used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Ranks, stage_named

from foveal.data.sample_images import read_sample_images
from foveal.inspect.image_grid import MARGIN
from foveal.training.cli import load_config


def read(configs: dict[str, Path], split: str) -> Any:
    stage = stage_named("pretrain")
    cfg = load_config(stage.config_class, "pretrain", str(configs["pretrain"]), ["run.dir=none", "engine.kind=plain"])
    plan = stage.functions.build_plan(cfg, 1)
    return read_sample_images(plan.dataset, cfg.data, split, 5)


def test_sample_images_are_spread_over_a_shard_and_always_the_same(configs) -> None:
    state = torch.random.get_rng_state()
    first, again = read(configs, "val"), read(configs, "val")
    assert torch.equal(first.images, again.images) and torch.equal(first.sample_keys, first.ids)
    assert first.images.shape == (5, 1, 16, 16) and first.images.float().std() > 0
    gaps = first.ids.diff()
    assert first.ids[0] == 0 and gaps.min() > 1 and gaps.max() - gaps.min() <= 1
    assert torch.equal(torch.random.get_rng_state(), state)


def pictures(run: Path) -> dict[str, np.ndarray]:
    return {file.name: np.asarray(Image.open(file)) for file in sorted((run / "pictures").iterdir())}


@pytest.mark.thorough
def test_two_ranks_draw_what_one_draws(configs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    words = ("engine.kind=accelerate", "run.stop_at_step=4", "log.images_every=2")
    for ranks, name in ((one_rank, "one"), (two_ranks, "two")):
        ranks.train(stage_named("pretrain"), configs["pretrain"], tmp_path / name, *words)
    one, two = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert list(one) == list(two) == ["reconstruction-00000002.png", "reconstruction-00000004.png"]
    originals = {grid[:, MARGIN : MARGIN + 128][-200:].tobytes() for grid in (*one.values(), *two.values())}
    assert len(originals) == 1
    for name, grid in one.items():
        assert np.abs(grid.astype(int) - two[name]).mean() < 1, "rounding of the weights"
