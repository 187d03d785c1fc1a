"""A step that is not finite never was: on every rank, under every engine, and the next one is as if it had not been."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from engines import OTHERS, SHAPES, Shape, Told, Trainer
from ranks import Ranks
from torch import Tensor

from foveal.distributed.world import World

_NAN, _INF = float("nan"), float("inf")
_SHAPES = SHAPES | OTHERS
Held = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a step: whether it was applied, whether weights and moments kept their bits, and the counter."""

    applied: bool
    finite_norm: bool
    finite_loss: bool
    kept: bool
    updates: int


def held(trainer: Trainer, prefix: str = "") -> Held:
    """A copy of what the rank holds, as bytes: NaN equals itself."""
    return [
        {
            part: value.clone().view(torch.uint8)
            for part, value in piece.flat_views_by_part.items()
            if part.startswith(prefix)
        }
        for piece in trainer.engine.state_chunks()
    ]


def same(one: Held, other: Held) -> bool:
    return all(
        here.keys() == there.keys() and all(here[part].equal(there[part]) for part in here)
        for here, there in zip(one, other, strict=True)
    )


def seen(trainer: Trainer, step: Callable[[], Told], parts: str = "") -> Seen:
    before = held(trainer, parts)
    told = step()
    norm, loss = (torch.tensor(value).isfinite().item() for value in (told.grad_norm, told.loss))
    kept = same(before, held(trainer, parts))
    return Seen(told.applied, bool(norm), bool(loss), kept, trainer.engine.num_updates)


def bad_batch(trainer: Trainer, number: int, micro: int) -> Told:
    """A step in which one number of one rank's images is NaN, in one micro."""

    def spoil(now: int, rows: Tensor) -> Tensor:
        if now == micro and trainer.world.rank == trainer.world.size - 1:
            rows[0, 0] = _NAN
        return rows

    return trainer.step(number, spoil)


def bad_gradient(trainer: Trainer, number: int, value: float) -> Told:
    """A step in which one number of a gradient is not finite on one rank; the loss does not show it."""

    def into(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    def hook(_module: object, _inputs: object, output: Tensor) -> None:
        if trainer.world.rank == trainer.world.size - 1:
            output.register_hook(into)

    handle = trainer.module.blocks[0].register_forward_hook(hook)
    try:
        return trainer.step(number)
    finally:
        handle.remove()


@contextmanager
def bad_weight(trainer: Trainer) -> Iterator[None]:
    """One number of the weights that one rank holds is NaN; afterwards it is what it was."""
    engine, world = trainer.engine, trainer.world
    weight = next(
        piece.flat_views_by_part["weight"] for piece in engine.state_chunks() if piece.name == "blocks.1.narrow.weight"
    )
    was, rank = weight.clone(), world.size - 1
    if world.rank == rank:
        weight[-1] = _NAN
    engine.on_state_loaded(engine.num_updates)
    yield
    weight.copy_(was)
    engine.on_state_loaded(engine.num_updates)


def undisturbed(world: World, shape: Shape) -> list[float]:
    return Trainer(world, shape).steps(0, 8)


def disturbed(world: World, shape: Shape) -> tuple[list[float], dict[str, Seen]]:
    """The losses of the good steps, and what became of the bad ones between them."""
    trainer = Trainer(world, shape)
    losses, found = trainer.steps(0, 2), {}
    found["batch"] = seen(trainer, lambda: bad_batch(trainer, 2, 1))
    losses += trainer.steps(2, 4)
    found["first micro"] = seen(trainer, lambda: bad_batch(trainer, 4, 0))
    losses += trainer.steps(4, 5)
    found["gradient"] = seen(trainer, lambda: bad_gradient(trainer, 5, _NAN))
    losses += trainer.steps(5, 6)
    found["overflow"] = seen(trainer, lambda: bad_gradient(trainer, 6, _INF))
    found["again"] = seen(trainer, lambda: bad_gradient(trainer, 6, -_INF))
    losses += trainer.steps(6, 7)
    with bad_weight(trainer):
        found["weight"] = seen(trainer, lambda: trainer.step(7), "exp_avg")
    losses += trainer.steps(7, 8)
    found["good"] = seen(trainer, lambda: trainer.step(8))
    return losses, found


UPDATES = {"batch": 2, "first micro": 4, "gradient": 5, "overflow": 6, "again": 6, "weight": 7}


# Every kind of guard; the rest are the same guards on other ranks, other products and other places of the moments.
_FIRST = ("plain", "zero 0, 2 ranks", "zero 2, 2 ranks", "zero 3, 2 ranks", "ddp, 2 ranks", "fsdp2, 2 ranks")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in _FIRST else pytest.mark.thorough) for each in _SHAPES]
)
def test_a_step_that_is_not_finite_never_was(name: str, one_rank: Ranks, two_ranks: Ranks) -> None:
    shape = _SHAPES[name]
    pool = {1: one_rank, 2: two_ranks}[shape.ranks]
    expected = pool.call(undisturbed, shape)
    answers = pool.call(disturbed, shape)
    assert [losses for losses, _ in answers] == expected
    for _, found in answers:
        for case, updates in UPDATES.items():
            loss = "gradient" in case or case in {"overflow", "again"}
            assert found[case] == Seen(False, False, loss, kept=True, updates=updates), case
        assert found["good"] == Seen(True, True, True, kept=False, updates=9)
