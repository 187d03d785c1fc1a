"""Operations of a step: how many, which read the device, and a step whose arithmetic is next to nothing."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loop_steps import loop_context
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.data.batch import Batch
from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder, resolve_sizes
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import Step, run_steps
from pretrain.objective import MaskedModelingLoss

# Operations that copy values from the device to the host, or whose shape the host has to wait for.
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
# Views that autograd does not track, and allocations.
_NO_KERNEL = ("_unsafe_view", "empty", "empty_like", "new_empty", "detach_")
_HERE = Path(__file__)


class OperationCounter(TorchDispatchMode):
    """Counts the operations inside its context, below autograd and autocast.

    ``operations`` and ``views`` by name: a view starts no kernel, and neither does an allocation, counted with them. ``reads``: device reads by the code they came from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            (self.views if func.is_view or func._opname in _NO_KERNEL else self.operations)[func._opname] += 1
        if func._opname in _READS:
            self.reads[_code_outside_torch()] += 1
        return func(*args, **(kwargs or {}))


def _code_outside_torch() -> str:
    """Return "file.py:function" of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = Path(frame.f_code.co_filename)
        if file != _HERE and "torch" not in file.parts:
            return f"{file.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of a masked autoencoder, and images per step."""

    vit: VitConfig
    decoder: DecoderConfig
    image_size: int
    images: int


# The blocks and tokens of a ViT-B, at widths that compute in no time.
THIN_VIT_B = Autoencoder(VitConfig(width=24, heads=2), DecoderConfig(width=16, heads=2), 224, 2)


def pretraining_steps(world: World, cfg: EngineConfig, sizes: Autoencoder = THIN_VIT_B) -> Iterator[Step]:
    """Yield the loop's own steps of pretraining, on the same images again and again."""
    torch.manual_seed(0)
    side, images = sizes.image_size, sizes.images
    encoder = build_encoder(sizes.vit, image_size=side, channels=3)
    model = MaskedAutoencoder(encoder, sizes.decoder)
    optim = OptimConfig(lr_per_256=1.5e-4)
    groups = parameter_groups(model, optim)
    engine = build_engine(model, groups, optim, cfg, world, microbatch_size=images, accumulation_steps=1)
    patch = resolve_sizes(sizes.vit).patch
    grid = (side // patch, side // patch)
    objective = MaskedModelingLoss(0, "random", 0.75, 1, True, patch, grid, (0.5,) * 3, (0.25,) * 3)
    context = loop_context(0, 10**9, 1, lambda _step: 1.5e-4, world)
    return run_steps(engine, _same_images(images, side), objective, context)


def _same_images(images: int, side: int) -> Iterator[Batch]:
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    ids, valid = torch.arange(images), torch.ones(images, dtype=torch.bool)
    step = 0
    while True:
        yield Batch(pixels, torch.zeros(images, dtype=torch.int64), ids, ids + step * images, valid, step, 0, 0)
        step += 1


def count_operations(steps: Iterator[Step]) -> OperationCounter:
    """Return the counts of one step, after two that create moments and caches."""
    for _ in range(2):
        next(steps)
    with OperationCounter() as counter:
        next(steps)
    return counter
