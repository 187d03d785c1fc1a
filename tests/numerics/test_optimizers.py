"""SGD, LARS and Muon as AdamW: any engine goes on from any other's checkpoint, and its own is bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from engines import Shape, Trainer, gathered
from ranks import Ranks

from foveal.distributed.world import World

SAVED, MORE = 3, 8
SHAPES = {
    "plain sgd": Shape(1, "plain", optim="sgd"),
    "ddp sgd": Shape(2, "accelerate", optim="sgd"),
    "fsdp2 sgd": Shape(2, "accelerate", sharding="fsdp2", optim="sgd"),
    "plain lars": Shape(1, "plain", optim="lars"),
    "ddp lars": Shape(2, "accelerate", optim="lars"),
    "plain muon": Shape(1, "plain", optim="muon"),
    "ddp muon": Shape(2, "accelerate", optim="muon"),
}
MOMENTS = {
    "sgd": {"momentum_buffer"},
    "lars": {"momentum_buffer"},
    "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq"},
}
# Muon rounds to bf16: a gradient that differs in its last bit may move these losses by 1e-4.
_REL = {"sgd": 1e-5, "lars": 1e-5, "muon": 1e-3}


def saved(world: World, shape: Shape, folder: Path) -> list[float]:
    trainer = Trainer(world, shape)
    trainer.steps(0, SAVED)
    trainer.save(folder)
    return trainer.steps(SAVED, SAVED + MORE)


def resumed(world: World, shape: Shape, folder: Path, again: Path) -> tuple[list[float], tuple[int, int]]:
    """The losses that follow, and the updates counted before and after; what was loaded is saved again first."""
    trainer = Trainer(world, shape)
    trainer.load(folder, SAVED)
    trainer.save(again)
    before = trainer.engine.num_updates
    return trainer.steps(SAVED, SAVED + MORE), (before, trainer.engine.num_updates)


@pytest.mark.parametrize("kind", ["sgd", pytest.param("lars", marks=pytest.mark.thorough), "muon"])
def test_any_engine_goes_on_from_any_other(kind: str, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    pools = {1: one_rank, 2: two_ranks}
    shapes = {name: shape for name, shape in SHAPES.items() if shape.optim == kind}
    for was, before in shapes.items():
        folder = tmp_path / was
        losses: Any = pools[before.ranks].call(saved, before, folder)[0]
        for now, after in shapes.items():
            again = tmp_path / f"{was} {now}"
            found, updates = pools[after.ranks].call(resumed, after, folder, again)[0]
            ours, theirs = gathered(again), gathered(folder)
            assert ours.keys() == theirs.keys()
            assert {name.partition(" ")[0] for name in ours} == {"weight", *MOMENTS[kind]}
            assert [name for name in ours if not ours[name].equal(theirs[name])] == []
            assert updates == (SAVED, SAVED + MORE)
            assert found == (losses if was == now else pytest.approx(losses, rel=_REL[kind]))
