"""One step, however it is cut: micros and ranks with unequal weights are one big batch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from finetune.tasks.classify import ClassificationLoss
from foveal.data import Batch
from foveal.distributed.world import World
from foveal.engines.base import EngineConfig
from foveal.engines.build import build_engine
from foveal.engines.plain import PlainEngine
from foveal.optim.optimizers import OptimConfig, parameter_groups
from foveal.training.loop import LoopContext, is_due, run_steps
from foveal.training.meters.metric_accumulator import MetricAccumulator, MetricRow
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
STEPS, IMAGES, CLASSES = 3, 8, 3
# Labels of the steps; -1 has none. Cut into two ranks of two micros, the parts weigh 2, 1, 0 and 2, and so on.
LABELS = [[0, 1, 2, -1, -1, -1, 1, 1], [-1, -1, -1, -1, -1, -1, -1, 2], [0, 0, 0, 0, 1, 2, 2, 2]]
OPTIM = OptimConfig(lr_per_256=1e-2, clip=0.05)


def nobody(_step: int, _what: object) -> None:
    """Nobody asks what a step is doing, nor what it consumed."""


def a_course(
    start: int, stop: int, micros: int, lr: Callable[[int], float], world: World, pace: ThroughputMeter | None = None
) -> LoopContext:
    """Steps whose numbers nobody else wants."""
    stragglers = StragglerMeter(world.device, "here")
    return LoopContext(
        start, stop, micros, lr, world, MetricAccumulator(), pace or ThroughputMeter(), stragglers, nobody, nobody
    )


class Tiny(nn.Module):
    """Logits of flat images; it takes drops as a classifier does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor, _drops: Tensor) -> Tensor:
        return self.head(images.flatten(1))


def batches(rank: int, ranks: int, micros: int) -> Iterator[Batch]:
    """This rank's part of the same steps, in so many micros."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        images = torch.randint(0, 256, (IMAGES, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels, ids = torch.tensor(LABELS[step]), torch.arange(IMAGES)
        size = IMAGES // ranks // micros
        for micro in range(micros):
            part = slice(start := (rank * micros + micro) * size, start + size)
            valid = torch.ones(size, dtype=torch.bool)
            yield Batch(images[part], labels[part], ids[part], ids[part], valid, step, 0, micro)


def classify() -> ClassificationLoss:
    off = {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "data": SimpleNamespace(labels="class")}
    cfg: Any = SimpleNamespace(seed=0, label_smoothing=0.1, **off)
    return ClassificationLoss(cfg, (0.5,), (0.25,), 0, torch.ones(CLASSES))


def trained(world: World, kind: str, micros: int) -> tuple[list[MetricRow], dict[str, Tensor]]:
    """Rows and weights after a few steps of a tiny classifier."""
    model = Tiny()
    cfg = EngineConfig(kind=kind)  # pyright: ignore[reportArgumentType]
    at_once = IMAGES // world.size // micros
    groups = parameter_groups(model, OPTIM)
    engine = build_engine(model, groups, OPTIM, cfg, world, microbatch_size=at_once, accumulation_steps=micros)
    objective = classify()
    course = a_course(0, STEPS, micros, lambda step: 1e-2 / (step + 1), world)
    for _ in run_steps(engine, batches(world.rank, world.size, micros), objective, course):
        pass
    return course.metric_accumulator.read_rows(world.all_reduce_sum), engine.full_state_dict()


@pytest.fixture(scope="module")
def whole() -> tuple[list[MetricRow], dict[str, Tensor]]:
    return trained(ALONE, "plain", 1)


def check(found: tuple[list[MetricRow], dict[str, Tensor]], whole: tuple[list[MetricRow], dict[str, Tensor]]) -> None:
    for row, expected in zip(found[0], whole[0], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_step_is_the_mean_over_labelled_images(whole: tuple[list[MetricRow], dict[str, Tensor]]) -> None:
    """The reference itself, against torch's own mean and clipping."""
    model = Tiny()
    optimizer = torch.optim.AdamW(
        [{"params": [model.head.weight], "weight_decay": 0.05}, {"params": [model.head.bias], "weight_decay": 0.0}],
        betas=OPTIM.betas,
    )
    for row, batch in zip(whole[0], batches(0, 1, 1), strict=True):
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
        assert row["grad_norm"] > 0.05, "else the clipping is not looked at"
    torch.testing.assert_close(whole[1]["head.weight"], model.head.weight.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micros", [2, 4, 8])
def test_micros_of_unequal_weight_are_one_batch(micros: int, whole: tuple[list[MetricRow], dict[str, Tensor]]) -> None:
    check(trained(ALONE, "plain", micros), whole)


@pytest.mark.parametrize("micros", [1, 2])
def test_ranks_of_unequal_weight_are_one_batch(
    micros: int, whole: tuple[list[MetricRow], dict[str, Tensor]], two_ranks: Ranks
) -> None:
    first, second = two_ranks.call(trained, "accelerate", micros)
    check(first, whole)
    assert second[0] == first[0]
    assert all(second[1][name].equal(value) for name, value in first[1].items())


@dataclass
class Recorder:
    """An objective whose loss is the weight of the model, and that writes down what it is given."""

    weights: float | Tensor = 8.0
    seen: list[tuple[int, int]] = field(default_factory=list)

    def batch_weight(self, batch: Batch) -> float | Tensor:
        return self.weights

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((batch.step, batch.microbatch_index))
        return next(model.parameters()).sum() * len(batch.ids), {"micro": torch.tensor(float(batch.microbatch_index))}


def plain(micros: int, optim: OptimConfig = OPTIM) -> PlainEngine:
    model = Tiny()
    return PlainEngine(model, parameter_groups(model, optim), optim, EngineConfig(kind="plain"), ALONE, micros)


def test_a_course_begins_where_it_is_told_and_takes_no_batch_too_many() -> None:
    engine, objective, world = plain(2), Recorder(4.0), ALONE
    course = a_course(1, 3, 2, float, world)
    stream = batches(0, 1, 2)
    for _ in range(2):
        next(stream)  # the loader begins at step 1 too
    found = list(run_steps(engine, stream, objective, course))
    assert [step.index for step in found] == [2, 3]
    assert [step.batch.microbatch_index for step in found] == [1, 1]
    assert objective.seen == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert next(stream, None) is None
    rows = course.metric_accumulator.read_rows(world.all_reduce_sum)
    # micros 0 and 1, summed, over the weight of both
    assert [(row["step"], row["lr"], row["micro"]) for row in rows] == [(2, 1.0, 1 / 8), (3, 2.0, 1 / 8)]


def test_nothing_is_taken_after_the_last_step() -> None:
    def empty() -> Iterator[Batch]:
        raise AssertionError("a batch was asked for")
        yield

    course = a_course(3, 3, 1, lambda _: 0.0, ALONE)
    assert list(run_steps(plain(1), empty(), Recorder(), course)) == []


def test_the_learning_rate_is_set_before_the_update_and_scaled_by_group() -> None:
    engine = plain(1)
    engine._optimizer.param_groups[1]["lr_scale"] = 0.5
    before = {name: value.clone() for name, value in engine.full_state_dict().items()}
    course = a_course(0, 1, 1, lambda _: 0.0, ALONE)
    next(run_steps(engine, batches(0, 1, 1), Recorder(), course))
    assert all(value.equal(before[name]) for name, value in engine.full_state_dict().items())
    engine.set_lr(0.2)
    assert [group["lr"] for group in engine._optimizer.param_groups] == [0.2, 0.1]


def test_a_weight_that_never_changes_costs_no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a collective for a weight that is known")

    monkeypatch.setattr(World, "all_reduce_sum", never)
    monkeypatch.setattr(World, "any_rank", lambda _world, flag: flag)
    world = World(0, 2, 0, "none", torch.device("cpu"))
    course = a_course(0, 1, 1, lambda _: 0.0, world)
    next(run_steps(plain(1), batches(0, 1, 1), Recorder(8.0), course))
    with pytest.raises(AssertionError, match="a collective"):
        next(run_steps(plain(1), batches(0, 1, 1), Recorder(torch.tensor(8.0)), course))


def test_pace_counts_the_images_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(ThroughputMeter):
        images = 0

        def count(self, images: int) -> None:
            self.images += images

    monkeypatch.setattr(World, "any_rank", lambda _world, flag: flag)
    pace = Told()
    course = a_course(0, STEPS, 2, lambda _: 0.0, World(0, 4, 0, "none", torch.device("cpu")), pace)
    for _ in run_steps(plain(2), batches(0, 1, 2), Recorder(), course):
        pass
    assert pace.images == STEPS * IMAGES * 4


def test_a_step_that_is_not_finite_is_said_and_not_applied() -> None:
    class Bad(Recorder):
        def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            total, numbers = super().__call__(model, batch)
            return total * (float("nan") if batch.step == 1 else 1.0), numbers

    engine = plain(1)
    course = a_course(0, STEPS, 1, lambda _: 1e-2, ALONE)
    stages = [
        (step.applied, engine.full_state_dict()["head.weight"].clone())
        for step in run_steps(engine, batches(0, 1, 1), Bad(), course)
    ]
    assert [applied for applied, _ in stages] == [True, False, True]
    assert stages[0][1].equal(stages[1][1])
    assert not stages[1][1].equal(stages[2][1])
    assert [row["applied"] for row in course.metric_accumulator.read_rows(ALONE.all_reduce_sum)] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("step", "every", "expected"),
    [(5, 5, True), (10, 5, True), (6, 5, False), (12, 5, True), (6, 0, False), (12, 0, True), (1, 1, True)],
)
def test_due(step: int, every: int, expected: bool) -> None:
    assert is_due(step, every, 12) is expected


class Overflowing:
    """A loss that has overflowed in some steps, and its gradients have not."""

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
    course, seen = a_course(0, STEPS, micros, lambda _: 1e-2, ALONE), []
    before = model.head.weight.detach().clone()
    for step in run_steps(engine, batches(0, 1, micros), Overflowing({0, 2}), course):
        seen.append((step.applied, model.head.weight.equal(before)))
        before = model.head.weight.detach().clone()
    assert seen == [(False, True), (True, False), (False, True)]
