"""The loop over optimizer steps, shared by all stages; logging, evaluation and saving belong to the stage."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from foveal.data.batch import Batch
from foveal.data.device_copy import CopyStream, DeviceBatches, open_copy_stream
from foveal.distributed.world import RankOutcome, World
from foveal.engines.base import Engine, StepResult
from foveal.engines.build import build_engine
from foveal.training.meters.metric_accumulator import MetricAccumulator, MetricRow
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.plan import Plan


class Objective(Protocol):
    """The loss of a stage.

    The loss of a step is the sum over the images of all ranks and microbatches, divided by the sum of their weights:
    with ignored labels, class weights and uneven masks, many ranks still compute the result of one rank. The weight is
    known before the forward: the first backward of an accumulated step needs the complete denominator, and the
    gradients of a sharded optimizer cannot be rescaled afterwards. A step whose weight is 0 on all ranks has no loss:
    it ends without a forward and without an update.
    """

    def batch_weight(self, batch: Batch) -> float | Tensor:
        """Return the weight of a batch on the host, at least 0.

        A float is the weight of every batch of this size.
        """
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and further metrics, all summed over the batch; each is logged as its sum over the weight."""
        ...


ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


@dataclass(frozen=True, slots=True)
class TrainingSetup(Generic[ObjectiveT]):
    """The inputs of an engine and of the loop: a model, its parameter groups for the optimizer, and the objective.

    ``frozen_modules``: modules that the objective calls and no optimizer updates.
    """

    model: nn.Module
    param_groups: list[dict[str, Any]]
    objective: ObjectiveT
    frozen_modules: tuple[nn.Module, ...] = ()


def build_stage_engine(setup: TrainingSetup[Any], plan: Plan, world: World) -> Engine:
    """Build the engine of a plan's settings, with the model on the device. It takes over the setup's model."""
    return build_engine(
        setup.model,
        setup.param_groups,
        plan.cfg.optim,
        plan.cfg.engine,
        world,
        microbatch_size=plan.microbatch_size,
        accumulation_steps=plan.accumulation_steps,
    )


class RankFlags(NamedTuple):
    """Questions of every step: of one rank, or the answer of any rank.

    is_asked_to_leave: by a signal, or because its launcher is gone. is_writing: a checkpoint. is_superseded: by another
    attempt at the run.
    """

    is_asked_to_leave: bool = False
    is_writing: bool = False
    is_superseded: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step that the device has been given; ``index`` counts from 1.

    ``result``: of its update, on the device; None for a step without weight, which has no update. ``flags``: of any
    rank, the same on every rank.
    """

    index: int
    result: StepResult | None
    flags: RankFlags


@dataclass(frozen=True)
class LoopContext:
    """The range of steps of one attempt (``after_step`` excluded, ``last_step`` included), its meters and callbacks.

    ``heartbeat`` receives the step and its current activity, ``on_batches_consumed`` the microbatches of a finished
    step. ``read_flags`` returns those of this rank.
    """

    after_step: int
    last_step: int
    accumulation_steps: int
    lr_schedule: Callable[[int], float]
    world: World
    metric_accumulator: MetricAccumulator
    throughput_meter: ThroughputMeter
    straggler_meter: StragglerMeter
    heartbeat: Callable[[int, str], None]
    on_batches_consumed: Callable[[int, Sequence[Batch]], None]
    read_flags: Callable[[], RankFlags] = RankFlags


def run_steps(engine: Engine, batches: Iterator[Batch], objective: Objective, context: LoopContext) -> Iterator[Step]:
    """Run optimizer steps and yield after each of them.

    ``batches`` starts at step ``context.after_step``. Neither the loop nor an engine waits for the device (except
    DeepSpeed where it offloads): what a step yields has been queued. The next step's data is fetched while the device
    computes. Then the ranks agree, in one collective of their processors, on that data, on its weight and on their
    flags: on the device the engine reduces gradients, and nothing else is reduced. A rank that lacks the data fails the
    next step on every rank before its forward, and not the evaluations and saves of this one.
    The engine does not see a step without weight: weights, moments, gradients and running statistics stay as they are.
    Its row has loss, gradient norm and ``step_applied`` 0 and no other metric.
    """
    fetch = partial(_fetch_step, batches, objective, context, engine.device, open_copy_stream(engine.device))
    first_step = context.after_step + 1
    upcoming = _agree_on_step(fetch, context, first_step, heartbeat_step=first_step)
    for step in range(first_step, context.last_step + 1):
        lr = context.lr_schedule(step - 1)
        engine.set_lr(lr)
        fetched, total_weight = upcoming.result_or_raise(), upcoming.total
        host_values: MetricRow = {"step": step, "lr": lr}
        result: StepResult | None = None
        if total_weight != 0:
            denominator = _mean_batch_weight(fetched.weights, total_weight, engine.device, context.world)
            rank_sums, result = _update(engine, objective, fetched.device_batches, denominator, context, step)
            replicated = {"grad_norm": result.grad_norm, "step_applied": result.applied}
            context.metric_accumulator.add_step(rank_sums, replicated, host_values)
        else:
            no_update = {"loss": 0.0} | host_values | {"grad_norm": 0.0, "step_applied": 0.0}
            context.metric_accumulator.add_step({}, {}, no_update)
        context.straggler_meter.add_step()
        context.on_batches_consumed(step, fetched.microbatches)
        context.throughput_meter.add_images(sum(len(batch.ids) for batch in fetched.microbatches) * context.world.size)
        upcoming = _agree_on_step(fetch, context, step + 1, heartbeat_step=step)
        yield Step(step, result, RankFlags(*upcoming.flags))


@dataclass(frozen=True, slots=True)
class _StepData:
    """This rank's microbatches of a step, their weights, and their copies on the device; of no step: empty."""

    microbatches: list[Batch]
    weights: list[float | Tensor]
    device_batches: DeviceBatches


def _fetch_step(
    batches: Iterator[Batch],
    objective: Objective,
    context: LoopContext,
    device: torch.device,
    copy_stream: CopyStream | None,
    step: int,
) -> _StepData:
    """Fetch the data of a step; of one beyond the last, nothing.

    On a GPU the first copy begins here, beside the update of the step before and the ranks' agreement.
    """
    num_microbatches = context.accumulation_steps if step <= context.last_step else 0
    with context.straggler_meter.time_data_fetch():
        microbatches = list(itertools.islice(batches, num_microbatches))
    weights = [objective.batch_weight(batch) for batch in microbatches]
    return _StepData(microbatches, weights, DeviceBatches(microbatches, device, copy_stream))


def _agree_on_step(
    fetch: Callable[[int], _StepData], context: LoopContext, step: int, *, heartbeat_step: int
) -> RankOutcome[_StepData]:
    """Fetch the data of a step on every rank, and agree on its weight and on the ranks' flags."""
    context.heartbeat(heartbeat_step, f"data for step {step}")
    with context.throughput_meter.time_data_wait():
        return context.world.run_all(partial(fetch, step), lambda data: _sum_weights(data.weights), context.read_flags)


def _update(
    engine: Engine,
    objective: Objective,
    device_batches: DeviceBatches,
    denominator: float | Tensor,
    context: LoopContext,
    step: int,
) -> tuple[dict[str, Tensor], StepResult]:
    """Run forward and backward of a step's microbatches and the update; return this rank's summand of each metric."""
    context.heartbeat(step, "training")
    accumulation_steps = context.accumulation_steps
    rank_sums: dict[str, Tensor] = {}
    for number, batch in enumerate(device_batches):
        with engine.microbatch(last=number == accumulation_steps - 1):
            with context.straggler_meter.time_forward():
                loss_sum, metric_sums = objective(engine.model, batch)
            engine.backward(_poison_nonfinite(loss_sum) / denominator)
        for name, value in ({"loss": loss_sum} | metric_sums).items():
            part = (value.detach() / denominator).double() / (accumulation_steps * context.world.size)
            rank_sums[name] = rank_sums.get(name, 0.0) + part
    context.heartbeat(step, "updating")
    return rank_sums, engine.step()


def _poison_nonfinite(loss_sum: Tensor) -> Tensor:
    """Make all gradients NaN if the loss is not finite.

    A loss can overflow while its gradients do not, and the engines check gradients only.
    """
    return loss_sum * torch.where(loss_sum.detach().isfinite(), 1.0, math.nan)


def _sum_weights(weights: Sequence[float | Tensor]) -> float:
    """Return the sum of weights, which are on the host; 0 without any."""
    if not weights:
        return 0.0
    return float(torch.stack([torch.as_tensor(weight) for weight in weights]).sum().double())


def _mean_batch_weight(
    weights: Sequence[float | Tensor], total_weight: float, device: torch.device, world: World
) -> float | Tensor:
    """Return the mean weight of a microbatch over all ranks; ``total_weight``: over ranks and microbatches.

    The engine averages over microbatches and ranks; a loss sum divided by this mean becomes sum over weight. A weight
    that differs between batches is a fp64 scalar on the device, filled there: a copy from the host would wait for it.
    """
    if not isinstance(weights[0], Tensor):
        return weights[0]
    mean_weight = total_weight / (len(weights) * world.size)
    return torch.full((), mean_weight, dtype=torch.float64, device=device)


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Return whether a periodic action is due after a step: every ``interval`` steps (0: never) and at the end."""
    return step == last_step or (interval > 0 and step % interval == 0)
