"""A checkpoint that is written while training goes on holds the state it was begun with, under real engines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SHAPES, Shape, Tiny, Trainer
from ranks import Ranks

from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World

STEPS = range(4, 9)


def _saved_in_passing(world: World, shape: Shape, root: Path) -> tuple[list[float], Any]:
    """Three steps, a save, and five steps more while and after it is written; their losses."""
    trainer = Trainer(world, shape)
    trainer.steps(1, 4)
    weights = {name: value.clone() for name, value in trainer.engine.gather_full_state_dict().items()}
    saver = CheckpointSaver(CheckpointStore(root, CheckpointConfig(), world, 1, {}))
    saver.save(trainer.engine, TrainState(3, 0.0, world.size, "", {}))
    losses = [trainer.step(STEPS[0]).loss]
    saver.wait_and_commit()
    return losses + [trainer.step(number).loss for number in STEPS[1:]], weights


def _gone_back(world: World, shape: Shape, root: Path) -> tuple[list[float], Any]:
    """Weights of the checkpoint in an engine that had gone elsewhere, and the losses of the same five steps."""
    trainer = Trainer(world, shape)
    trainer.steps(1, 3)
    store = CheckpointStore(root, CheckpointConfig(), world, 2, {1: 0})
    found = store.find_latest_valid()
    assert found is not None
    store.load(found[0], trainer.engine, found[1])
    assert found[1].updates == trainer.engine.num_updates == 3
    weights = {name: value.clone() for name, value in trainer.engine.gather_full_state_dict().items()}
    return [trainer.step(number).loss for number in STEPS], weights


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero 2, 2 ranks", marks=pytest.mark.thorough),
        "zero 3, 2 ranks",
        pytest.param("ddp, 2 ranks", marks=pytest.mark.thorough),
        "fsdp2, 2 ranks",
    ],
)
def test_steps_that_are_taken_meanwhile_are_not_in_it(name: str, two_ranks: Ranks, tmp_path: Path) -> None:
    saved = two_ranks.call(_saved_in_passing, SHAPES[name], tmp_path)
    restored = two_ranks.call(_gone_back, SHAPES[name], tmp_path)
    assert saved[0][1].keys() == Tiny().state_dict().keys(), "rank 0 writes exports"
    assert not saved[1][1], "the host of a node holds one copy, not one for each GPU"
    for (losses, weights), (again, loaded) in zip(saved, restored, strict=True):
        assert again == losses
        assert weights.keys() == loaded.keys()
        for each in weights:
            assert torch.equal(weights[each], loaded[each]), each
