"""Steps cut into microbatches and ranks of unequal weights give the result of one large batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engines import SHAPES, Shape
from loop_steps import ALONE, IMAGES, LABELS, OPTIM, STEPS, Tiny, batches, build_tiny_engine, classify, loop_context
from ranks import Ranks
from torch import Tensor, nn

from foveal.data.batch import Batch
from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.engines.plain import PlainEngine
from foveal.errors import DataError
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import Step, is_due, run_steps
from foveal.training.meters.metric_accumulator import MetricRow
from foveal.training.meters.throughput import ThroughputMeter

Result = tuple[list[MetricRow], dict[str, Tensor]]  # metric rows and weights by name


def trained(world: World, kind: str, micros: int) -> Result:
    """Return metric rows and weights after a few steps of a tiny classifier."""
    model = Tiny()
    cfg = EngineConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    engine = build_tiny_engine(model, cfg, world, micros)
    objective = classify()
    context = loop_context(0, STEPS, micros, lambda step: 1e-2 / (step + 1), world)
    for _ in run_steps(engine, batches(world.rank, world.size, micros), objective, context):
        pass
    return context.metric_accumulator.pop_rows(world.all_reduce_sum), model.state_dict()


def is_applied(step: Step) -> bool | None:
    """Read whether a step's update was applied; None without one."""
    return None if step.result is None else bool(step.result.applied)


@pytest.fixture(scope="module")
def reference() -> Result:
    return trained(ALONE, "plain", 1)


def check_equal(result: Result, reference: Result) -> None:
    for row, expected in zip(result[0], reference[0], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    for name, value in reference[1].items():
        torch.testing.assert_close(result[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_step_is_the_mean_over_labelled_images(reference: Result) -> None:
    """Compare the reference with torch's mean and gradient clipping."""
    model = Tiny()
    optimizer = torch.optim.AdamW(
        [{"params": [model.head.weight], "weight_decay": 0.05}, {"params": [model.head.bias], "weight_decay": 0.0}],
        betas=OPTIM.betas,
    )
    for row, batch in zip(reference[0], batches(0, 1, 1), strict=True):
        images = (batch.images.float() / 255 - 0.5) / 0.25
        logits = model(images, torch.empty(0))
        loss = nn.functional.cross_entropy(logits, batch.labels, ignore_index=-1, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (batch.step + 1)
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert row["grad_norm"] > 0.05, "otherwise the test does not cover clipping"
    torch.testing.assert_close(reference[1]["head.weight"], model.head.weight.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micros", [2, 4, 8])
def test_micros_of_unequal_weight_are_one_batch(micros: int, reference: Result) -> None:
    check_equal(trained(ALONE, "plain", micros), reference)


@pytest.mark.parametrize("micros", [1, 2])
def test_ranks_of_unequal_weight_are_one_batch(micros: int, reference: Result, two_ranks: Ranks) -> None:
    first, second = two_ranks.call(trained, "accelerate", micros)
    check_equal(first, reference)
    assert second[0] == first[0]
    assert all(second[1][name].equal(value) for name, value in first[1].items())


_SHAPES = [
    pytest.param(name, marks=() if name in ("plain", "zero 0, 2 ranks", "zero 3, 2 ranks") else pytest.mark.thorough)
    for name in SHAPES
    if name == "plain" or "1 ranks" not in name
]


def run_unlabelled_step(world: World, shape: Shape) -> tuple[list[tuple[bool | None, bool, int]], list[MetricRow]]:
    """Train three steps, the second without a label: per step applied, state kept, updates; and the rows."""
    model, micros = Tiny(), 2
    engine = build_tiny_engine(model, shape.config, world, micros)
    context, results = loop_context(0, STEPS, micros, lambda _: 1e-2, world), []
    stream = batches(world.rank, world.size, micros, [LABELS[0], [-1] * IMAGES, LABELS[2]])

    def copy_state() -> list[Tensor]:
        return [value.clone() for chunk in engine.state_chunks() for value in chunk.flat_views_by_part.values()]

    before = copy_state()
    for step in run_steps(engine, stream, classify(), context):
        state = copy_state()
        kept = all(map(torch.equal, state, before))
        results.append((is_applied(step), kept, engine.num_updates))
        before = state
    return results, context.metric_accumulator.pop_rows(world.all_reduce_sum)


@pytest.mark.parametrize("name", _SHAPES)
def test_a_step_without_weight_changes_nothing(name: str, one_rank: Ranks, two_ranks: Ranks) -> None:
    pool = {1: one_rank, 2: two_ranks}[SHAPES[name].ranks]
    for results, rows in pool.call(run_unlabelled_step, SHAPES[name]):
        assert results == [(True, False, 1), (None, True, 1), (True, False, 2)]
        assert rows[1] == {"step": 2, "loss": 0.0, "lr": 1e-2, "grad_norm": 0.0, "step_applied": 0.0}
        assert all(row["loss"] > 0 and row["step_applied"] == 1 for row in (rows[0], rows[2]))


@dataclass
class Recorder:
    """An objective whose loss is a sum of model weights; it records the batches it receives."""

    weights: float | Tensor = 8.0
    calls: list[tuple[int, int]] = field(default_factory=list)

    def batch_weight(self, batch: Batch) -> float | Tensor:
        return self.weights

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append((batch.step, batch.microbatch_index))
        return next(model.parameters()).sum() * len(batch.ids), {"micro": torch.tensor(float(batch.microbatch_index))}


def plain(micros: int, optim: OptimConfig = OPTIM) -> PlainEngine:
    model = Tiny()
    return PlainEngine(model, parameter_groups(model, optim), optim, EngineConfig(kind="plain"), ALONE, micros)


def test_a_course_begins_where_it_is_told_and_takes_no_batch_too_many() -> None:
    engine, objective, world = plain(2), Recorder(4.0), ALONE
    context = loop_context(1, 3, 2, float, world)
    stream = batches(0, 1, 2)
    for _ in range(2):
        next(stream)  # the loader begins at step 1 too
    steps = list(run_steps(engine, stream, objective, context))
    assert [step.index for step in steps] == [2, 3]
    assert objective.calls == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert next(stream, None) is None
    rows = context.metric_accumulator.pop_rows(world.all_reduce_sum)
    # the sum of microbatches 0 and 1 over the weight of both
    assert [(row["step"], row["lr"], row["micro"]) for row in rows] == [(2, 1.0, 1 / 8), (3, 2.0, 1 / 8)]


def test_nothing_is_taken_after_the_last_step() -> None:
    def empty() -> Iterator[Batch]:
        raise AssertionError("a batch was asked for")
        yield

    context = loop_context(3, 3, 1, lambda _: 0.0, ALONE)
    assert list(run_steps(plain(1), empty(), Recorder(), context)) == []


def test_the_learning_rate_is_set_before_the_update_and_scaled_by_group() -> None:
    engine = plain(1)
    engine._optimizer.param_groups[1]["lr_scale"] = 0.5
    before = {name: value.clone() for name, value in engine.gather_full_state_dict().items()}
    context = loop_context(0, 1, 1, lambda _: 0.0, ALONE)
    next(run_steps(engine, batches(0, 1, 1), Recorder(), context))
    assert all(value.equal(before[name]) for name, value in engine.gather_full_state_dict().items())
    engine.set_lr(0.2)
    assert [group["lr"] for group in engine._optimizer.param_groups] == [0.2, 0.1]


class HostCollectivesOfOne(HostCollectives):
    """The only rank that answers; it counts what it is asked."""

    def __init__(self) -> None:
        super().__init__([])
        self.num_calls = 0

    def all_reduce(self, values: Sequence[float], combine: Callable[[Sequence[float]], float]) -> list[float]:
        self.num_calls += 1
        return super().all_reduce(values, combine)


@pytest.mark.parametrize("weight", [8.0, torch.tensor(8.0)])
def test_ranks_agree_on_microbatches_weight_and_flags_in_one_collective_a_step(
    weight: float | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a collective of the device")

    monkeypatch.setattr(World, "all_reduce_sum", never)
    host = HostCollectivesOfOne()
    context = loop_context(0, STEPS, 2, lambda _: 0.0, World(0, 2, 0, "none", torch.device("cpu"), "", host))
    steps = run_steps(plain(2), batches(0, 1, 2), Recorder(weight), context)
    assert [host.num_calls for _ in steps] == [2, 3, 4], "one before the first step, and one at the end of each"


def run_until_data_fails(world: World) -> tuple[list[int], list[tuple[int, int]], str]:
    """Train while rank 1 finds no data for the third step: steps that were yielded, forwards, and the error."""

    def stream() -> Iterator[Batch]:
        for batch in batches(world.rank, world.size, 1):
            if (batch.step, world.rank) == (2, 1):
                raise DataError("no data")
            yield batch

    objective, steps = Recorder(4.0), []
    engine = build_tiny_engine(Tiny(), EngineConfig(kind="accelerate"), world, 1)
    try:
        for step in run_steps(engine, stream(), objective, loop_context(0, STEPS, 1, float, world)):
            steps.append(step.index)
            world.barrier()  # a save or an evaluation after the step
    except DataError as error:
        return steps, objective.calls, str(error)
    raise AssertionError("the data did not fail")


def test_no_rank_enters_a_forward_for_which_another_lacks_data(two_ranks: Ranks) -> None:
    """The step before is complete on every rank, with what is due after it."""
    for result in two_ranks.call(run_until_data_fails):
        assert result == ([1, 2], [(0, 0), (1, 0)], "no data")


def test_pace_counts_the_images_of_all_ranks() -> None:
    class ImageCounter(ThroughputMeter):
        images = 0

        def add_images(self, images: int) -> None:
            self.images += images

    meter, world = ImageCounter(), World(0, 4, 0, "none", torch.device("cpu"), "", HostCollectivesOfOne())
    context = loop_context(0, STEPS, 2, lambda _: 0.0, world, meter)
    for _ in run_steps(plain(2), batches(0, 1, 2), Recorder(), context):
        pass
    assert meter.images == STEPS * IMAGES * 4


def test_a_step_that_is_not_finite_is_said_and_not_applied() -> None:
    class Bad(Recorder):
        def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            total, numbers = super().__call__(model, batch)
            return total * (float("nan") if batch.step == 1 else 1.0), numbers

    engine = plain(1)
    context = loop_context(0, STEPS, 1, lambda _: 1e-2, ALONE)
    states = [
        (is_applied(step), engine.gather_full_state_dict()["head.weight"].clone())
        for step in run_steps(engine, batches(0, 1, 1), Bad(), context)
    ]
    assert [applied for applied, _ in states] == [True, False, True]
    assert states[0][1].equal(states[1][1])
    assert not states[1][1].equal(states[2][1])
    assert [row["step_applied"] for row in context.metric_accumulator.pop_rows(ALONE.all_reduce_sum)] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("step", "every", "expected"),
    [(5, 5, True), (10, 5, True), (6, 5, False), (12, 5, True), (6, 0, False), (12, 0, True), (1, 1, True)],
)
def test_due(step: int, every: int, expected: bool) -> None:
    assert is_due(step, every, 12) is expected


class Overflowing:
    """A loss that is infinite in some steps while its gradients are finite."""

    def __init__(self, steps: set[int]) -> None:
        self._inner, self._steps = classify(), steps

    def batch_weight(self, batch: Batch) -> float | Tensor:
        return self._inner.batch_weight(batch)

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, numbers = self._inner(model, batch)
        return total + (math.inf if batch.step in self._steps and batch.microbatch_index == 0 else 0.0), numbers


@pytest.mark.parametrize("micros", [1, 2])
def test_a_loss_that_overflows_alone_is_refused_too(micros: int) -> None:
    model = Tiny()
    engine = build_engine(
        model,
        parameter_groups(model, OPTIM),
        OPTIM,
        EngineConfig(kind="plain"),
        ALONE,
        microbatch_size=8 // micros,
        accumulation_steps=micros,
    )
    context, outcomes = loop_context(0, STEPS, micros, lambda _: 1e-2, ALONE), []
    before = model.head.weight.detach().clone()
    for step in run_steps(engine, batches(0, 1, micros), Overflowing({0, 2}), context):
        outcomes.append((is_applied(step), model.head.weight.equal(before)))
        before = model.head.weight.detach().clone()
    assert outcomes == [(False, True), (True, False), (False, True)]
