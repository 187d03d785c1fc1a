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
from foveal.training.meters.metric_accumulator import MetricAccumulator
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter


class Objective(Protocol):
    """What a stage learns from a batch.

    The loss of a step is the sum over all images of all ranks and micros, divided by their weight, so that ignored
    labels, class weights and uneven masks keep many ranks equal to one. The weight is asked for before the forward:
    the first backward of an accumulated step already needs the whole denominator, and a sharded optimizer's gradients
    cannot be rescaled afterwards.
    """

    def batch_weight(self, batch: Batch) -> float | Tensor:
        """The batch's weight. A float says that every batch of this size has the same: no collective is spent on it."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and further numbers, all summed over the batch: each is reported as its sum over the weight."""
        ...


ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


@dataclass(frozen=True, slots=True)
class TrainingSetup(Generic[ObjectiveT]):
    """What a step is made of before an engine takes it: a model, its parameter groups for the optimizer, and the objective.

    ``frozen``: the modules that the objective asks and nothing trains.
    """

    model: nn.Module
    param_groups: list[dict[str, Any]]
    objective: ObjectiveT
    frozen_modules: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A finished optimizer step: ``index`` counts from 1; ``batch`` is this rank's last micro, for pictures."""

    index: int
    batch: Batch
    applied: bool


@dataclass(frozen=True)
class LoopContext:
    """The steps of one attempt, from ``start`` to ``stop``, each of ``accumulate`` micros, and where their numbers go.

    ``beat`` hears what every step is doing, ``consumed`` of the micros of every step that has been taken.
    """

    start_step: int
    stop_step: int
    accumulation_steps: int
    lr_schedule: Callable[[int], float]
    world: World
    metric_accumulator: MetricAccumulator
    throughput_meter: ThroughputMeter
    straggler_meter: StragglerMeter
    heartbeat: Callable[[int, str], None]
    on_batches_consumed: Callable[[int, Sequence[Batch]], None]


def run_steps(engine: Engine, batches: Iterator[Batch], objective: Objective, context: LoopContext) -> Iterator[Step]:
    """Yield after every optimizer step. What happens when is the caller's business.

    ``batches`` begins at step ``course.start``. Nothing here reads a number from the device, except what an engine's
    clipping reads.
    """
    ranks, accumulate = context.world.size, context.accumulation_steps
    for index in range(context.start_step, context.stop_step):
        rate = context.lr_schedule(index)
        engine.set_lr(rate)
        context.heartbeat(index + 1, "data")
        with context.throughput_meter.time_data_wait():
            micros = context.world.run_all_or_raise(partial(_fetch_microbatches, batches, context))
        context.heartbeat(index + 1, "training")
        share = _mean_batch_weight([objective.batch_weight(batch) for batch in micros], context.world)
        sums: dict[str, Tensor] = {}
        for number, host_batch in enumerate(micros):
            batch = host_batch.to(engine.device, non_blocking=True)
            with engine.microbatch(last=number == accumulate - 1):
                with context.straggler_meter.time_forward():
                    total, numbers = objective(engine.model, batch)
                engine.backward(_poison_nonfinite(total) / share)
            for name, value in ({"loss": total} | numbers).items():
                sums[name] = sums.get(name, 0.0) + (value.detach() / share).double() / (accumulate * ranks)
        context.heartbeat(index + 1, "updating")
        outcome = engine.step()
        context.metric_accumulator.add_step(
            sums, {"step": index + 1, "lr": rate, "grad_norm": outcome.grad_norm, "applied": float(outcome.applied)}
        )
        context.on_batches_consumed(index + 1, micros)
        context.throughput_meter.add_images(len(batch.ids) * accumulate * ranks)
        yield Step(index + 1, batch, outcome.applied)


def _poison_nonfinite(total: Tensor) -> Tensor:
    """A loss that is not finite makes all its gradients so: it may have overflowed where they did not, and the engines'
    guards look at gradients alone.
    """
    return total * torch.where(total.detach().isfinite(), 1.0, math.nan)


def _fetch_microbatches(batches: Iterator[Batch], context: LoopContext) -> list[Batch]:
    with context.straggler_meter.time_data_fetch():
        return list(itertools.islice(batches, context.accumulation_steps))


def _mean_batch_weight(weights: list[float | Tensor], world: World) -> float | Tensor:
    """The mean weight of a micro over all ranks: with it, the engine's mean over micros and ranks is sum over weight."""
    if not isinstance(weights[0], Tensor):
        return weights[0]
    whole = world.all_reduce_sum(
        torch.stack([torch.as_tensor(weight) for weight in weights]).sum().double().to(world.device)
    )
    return whole / (len(weights) * world.size)


def is_due(step: int, interval: int, stop_step: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this step."""
    return step == stop_step or (interval > 0 and step % interval == 0)
