"""Steps of the loop on a tiny classifier: its batches, its objective, and a context without a run."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.tasks.classify import ClassificationLoss
from foveal.data.batch import Batch
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import LoopContext
from foveal.training.meters.metric_accumulator import MetricAccumulator
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
STEPS, IMAGES, CLASSES = 3, 8, 3
# Labels per step; -1: no label. Cut into two ranks with two microbatches each, the first step's weights are 2, 1, 0, 2.
LABELS = [[0, 1, 2, -1, -1, -1, 1, 1], [-1, -1, -1, -1, -1, -1, -1, 2], [0, 0, 0, 0, 1, 2, 2, 2]]
OPTIM = OptimConfig(lr_per_256=1e-2, max_grad_norm=0.05)


def ignore(_step: int, _argument: object) -> None:
    """Callback that does nothing."""


def loop_context(
    start: int, stop: int, micros: int, lr: Callable[[int], float], world: World, meter: ThroughputMeter | None = None
) -> LoopContext:
    """Build a context with fresh meters and callbacks that do nothing."""
    return LoopContext(
        after_step=start,
        last_step=stop,
        accumulation_steps=micros,
        lr_schedule=lr,
        world=world,
        metric_accumulator=MetricAccumulator(),
        throughput_meter=meter or ThroughputMeter(),
        straggler_meter=StragglerMeter(world.device, "here"),
        heartbeat=ignore,
        on_batches_consumed=ignore,
    )


class Tiny(nn.Module):
    """A linear layer on flat images, with a classifier's argument for drop path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor, _drops: Tensor) -> Tensor:
        return self.head(images.flatten(1))


def build_tiny_engine(model: Tiny, cfg: EngineConfig, world: World, micros: int) -> Engine:
    """An engine for a rank that cuts its share of IMAGES into ``micros`` microbatches."""
    groups, at_once = parameter_groups(model, OPTIM), IMAGES // world.size // micros
    return build_engine(model, groups, OPTIM, cfg, world, microbatch_size=at_once, accumulation_steps=micros)


def batches(rank: int, ranks: int, micros: int, labels_by_step: list[list[int]] = LABELS) -> Iterator[Batch]:
    """Yield this rank's part of the same steps, cut into microbatches."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        images = torch.randint(0, 256, (IMAGES, 1, 4, 4), generator=generator, dtype=torch.uint8)
        labels, ids = torch.tensor(labels_by_step[step]), torch.arange(IMAGES)
        size = IMAGES // ranks // micros
        for micro in range(micros):
            part = slice(start := (rank * micros + micro) * size, start + size)
            valid = torch.ones(size, dtype=torch.bool)
            yield Batch(images[part], labels[part], ids[part], ids[part], valid, step, 0, micro)


def classify() -> ClassificationLoss:
    off = {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    cfg: Any = SimpleNamespace(seed=0, label_smoothing=0.1, **off)
    return ClassificationLoss(cfg, (0.5,), (0.25,), 0, torch.ones(CLASSES))
