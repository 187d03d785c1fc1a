"""One optimizer step, said once. A stage writes its own timetable around it."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from foveal.data import Batch
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.training.meters.metric_accumulator import Totals
from foveal.training.meters.stragglers import Stragglers
from foveal.training.meters.throughput import Pace


class Objective(Protocol):
    """What a stage learns from a batch.

    The loss of a step is the sum over all images of all ranks and micros, divided by their weight, so that ignored
    labels, class weights and uneven masks keep many ranks equal to one. The weight is asked for before the forward:
    the first backward of an accumulated step already needs the whole denominator, and a sharded optimizer's gradients
    cannot be rescaled afterwards.
    """

    def weight(self, batch: Batch) -> float | Tensor:
        """The batch's weight. A float says that every batch of this size has the same: no collective is spent on it."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and further numbers, all summed over the batch: each is reported as its sum over the weight."""
        ...


Goal = TypeVar("Goal", bound=Objective)


@dataclass(frozen=True, slots=True)
class Parts(Generic[Goal]):
    """What a step is made of before an engine takes it: a model, its parameter groups for the optimizer, and the objective.

    ``frozen``: the modules that the objective asks and nothing trains.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    objective: Goal
    frozen: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A finished optimizer step: ``index`` counts from 1; ``batch`` is this rank's last micro, for pictures."""

    index: int
    batch: Batch
    applied: bool


@dataclass(frozen=True)
class Course:
    """The steps of one attempt, from ``start`` to ``stop``, each of ``accumulate`` micros, and where their numbers go.

    ``beat`` hears what every step is doing, ``consumed`` of the micros of every step that has been taken.
    """

    start: int
    stop: int
    accumulate: int
    lr: Callable[[int], float]
    world: World
    totals: Totals
    pace: Pace
    stragglers: Stragglers
    beat: Callable[[int, str], None]
    consumed: Callable[[int, Sequence[Batch]], None]


def steps(engine: Engine, batches: Iterator[Batch], objective: Objective, course: Course) -> Iterator[Step]:
    """Yield after every optimizer step. What happens when is the caller's business.

    ``batches`` begins at step ``course.start``. Nothing here reads a number from the device, except what an engine's
    clipping reads.
    """
    ranks, accumulate = course.world.size, course.accumulate
    for index in range(course.start, course.stop):
        rate = course.lr(index)
        engine.set_lr(rate)
        course.beat(index + 1, "data")
        with course.pace.waiting():
            micros = course.world.together(partial(_fetched, batches, course))
        course.beat(index + 1, "training")
        share = _mean_weight([objective.weight(batch) for batch in micros], course.world)
        sums: dict[str, Tensor] = {}
        for number, host_batch in enumerate(micros):
            batch = host_batch.to(engine.device, non_blocking=True)
            with engine.micro(last=number == accumulate - 1):
                with course.stragglers.working():
                    total, numbers = objective(engine.model, batch)
                engine.backward(_felt(total) / share)
            for name, value in ({"loss": total} | numbers).items():
                sums[name] = sums.get(name, 0.0) + (value.detach() / share).double() / (accumulate * ranks)
        course.beat(index + 1, "updating")
        outcome = engine.step()
        course.totals.add(
            sums, {"step": index + 1, "lr": rate, "grad_norm": outcome.grad_norm, "applied": float(outcome.applied)}
        )
        course.consumed(index + 1, micros)
        course.pace.count(len(batch.ids) * accumulate * ranks)
        yield Step(index + 1, batch, outcome.applied)


def _felt(total: Tensor) -> Tensor:
    """A loss that is not finite makes all its gradients so: it may have overflowed where they did not, and the engines'
    guards look at gradients alone.
    """
    return total * torch.where(total.detach().isfinite(), 1.0, math.nan)


def _fetched(batches: Iterator[Batch], course: Course) -> list[Batch]:
    with course.stragglers.fetching():
        return list(itertools.islice(batches, course.accumulate))


def _mean_weight(weights: list[float | Tensor], world: World) -> float | Tensor:
    """The mean weight of a micro over all ranks: with it, the engine's mean over micros and ranks is sum over weight."""
    if not isinstance(weights[0], Tensor):
        return weights[0]
    whole = world.sum(torch.stack([torch.as_tensor(weight) for weight in weights]).sum().double().to(world.device))
    return whole / (len(weights) * world.size)


def due(step: int, every: int, stop: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this step."""
    return step == stop or (every > 0 and step % every == 0)
