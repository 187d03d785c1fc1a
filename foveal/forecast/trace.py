"""A step without memory: a stage's own model and objective on fake tensors, which have sizes and no bytes.

Every operator of a micro is run in its order, so that what autograd saves, what is computed again and what lives at the
same time are counted, not estimated.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from foveal.data import Batch, LabelKind
from foveal.engines.base import Precision, autocast
from foveal.errors import ConfigError
from foveal.models.backbone import depends_on_others
from foveal.training.loop import Parts

# A processor's fused attention saves what a GPU's does: queries, keys, values, the output and its logarithmic sums.
_DEVICE = torch.device("cpu")
_META = torch.device("meta")
_BOXES = 16  # of an image that nobody has seen

Build = Callable[[torch.device], Parts]


@dataclass(frozen=True, slots=True)
class Weights:
    """How many numbers are trained (``products``: those of linear layers), and the bytes of what is not trained.

    ``sizes`` are those of every trained parameter, ``blocks`` those of every repeated block; ``kept_bytes`` are the
    untrained tensors of the model that a checkpoint holds. ``recomputes``: whether activations can be recomputed;
    ``fewest``: the fewest images at once that it can learn from.
    """

    trained: int
    products: int
    sizes: tuple[int, ...]
    blocks: tuple[int, ...]
    frozen_bytes: int
    kept_bytes: int
    recomputes: bool = True
    fewest: int = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """The bytes of a micro besides weights and finished gradients.

    ``moments``: for so many bytes of finished gradients, the most that lived meanwhile.
    """

    moments: dict[int, int]

    def peak(self, kept: Callable[[int], float]) -> float:
        """The most at once, if ``kept(done)`` bytes are what an engine keeps while ``done`` bytes of gradients are done."""
        return max(alive + kept(done) for done, alive in self.moments.items())


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of a sample, two for a multiplication and an addition, without recomputation."""

    forward: float
    both: float


def weights_of(build: Build) -> Weights:
    """Count a stage's model and its frozen companions."""
    parts = _outline(build)
    trained = [each for each in parts.model.parameters() if each.requires_grad]
    linear = [module for module in parts.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    still = [each for each in parts.model.parameters() if not each.requires_grad]
    buffers = dict(parts.model.named_buffers())
    saved = [buffers[name] for name in parts.model.state_dict() if name in buffers]
    companions = [each for module in parts.frozen for each in (*module.parameters(), *module.buffers())]
    return Weights(
        trained=sum(each.numel() for each in trained),
        products=sum(
            each.numel() for module in linear for each in module.parameters(recurse=False) if each.requires_grad
        ),
        sizes=tuple(each.numel() for each in trained),
        blocks=tuple(sum(each.numel() for each in block.parameters()) for block in _blocks(parts.model)),
        frozen_bytes=sum(each.nbytes for each in (*still, *buffers.values(), *companions)),
        kept_bytes=sum(each.nbytes for each in (*still, *saved)),
        recomputes=_recomputes(parts.model),
        fewest=2 if depends_on_others(parts.model) else 1,
    )


def _recomputes(model: Any) -> bool:
    try:
        model.set_grad_checkpointing(enable=True)
    except (AttributeError, ConfigError):
        return False
    return True


def flops_of(
    build: Build, channels: int, sides: tuple[int, int], labels: LabelKind = "class", classes: int = 1
) -> Flops:
    """Count the forward and backward of one sample of these channels and (height, width), with labels of this kind.

    Attention is counted as plain matrix products: what a fused kernel computes twice in its backward is not work done.
    """
    parts = _outline(build)
    with _without_memory(parts) as model, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total, _ = parts.objective(
            model, _batch(2, channels, sides, labels, classes)
        )  # BatchNorm learns nothing from one
        forward = counter.get_total_flops()
        total.backward()
    return Flops(forward / 2, counter.get_total_flops() / 2)


def trace_of(
    build: Build,
    samples: int,
    channels: int,
    sides: tuple[int, int],
    labels: LabelKind = "class",
    classes: int = 1,
    *,
    precision: Precision,
    recompute: bool,
) -> Trace:
    """Follow one micro of so many samples."""
    parts = _outline(build)
    with _without_memory(parts) as model:
        if recompute:
            cast(Any, model).set_grad_checkpointing(enable=True)
        known = [*model.parameters(), *model.buffers()]
        known += [each for module in parts.frozen for each in (*module.parameters(), *module.buffers())]
        watch = _Watch(known)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(watch.finished)
        with watch, autocast(_DEVICE, precision):
            total, _ = parts.objective(model, _batch(samples, channels, sides, labels, classes))
            with autocast(_DEVICE, "fp32"):
                total.backward()
    return Trace(watch.moments)


class _Watch(TorchDispatchMode):
    """Counts the bytes of storages that were made since, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.moments: dict[int, int] = {}
        self._alive = self._done = 0
        self._storages: dict[int, weakref.ref] = {}
        self._known = {_place(each) for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return out

    def finished(self, parameter: Tensor) -> None:
        """A gradient is whole, and no longer the micro's."""
        assert parameter.grad is not None
        self._done += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self._note()

    def _meet(self, tensor: Tensor) -> None:
        storage, place = tensor.untyped_storage(), _place(tensor)
        if place in self._storages or place in self._known:
            return
        size = storage.nbytes()
        self._alive += size
        self._storages[place] = weakref.ref(storage, functools.partial(self._gone, place, size))
        self._note()

    def _note(self) -> None:
        self.moments[self._done] = max(self.moments.get(self._done, 0), self._alive)

    def _gone(self, place: int, size: int, _reference: Any) -> None:
        self._alive -= size
        del self._storages[place]


def _place(tensor: Tensor) -> int:
    """What distinguishes a living storage from all others."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - a fake storage has no address


def _outline(build: Build) -> Parts:
    """The parts of a stage on the meta device, where weights cost nothing and reading them into it does nothing."""
    with torch.random.fork_rng(devices=[]), _META, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(_META)


@contextmanager
def _without_memory(parts: Parts) -> Iterator[nn.Module]:
    """The parts' model, training, among fake tensors that behave as on a processor."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in parts.frozen:
            module.to_empty(device=_DEVICE)
        yield parts.model.to_empty(device=_DEVICE).train()


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The children of lists of modules of one type: what FSDP2 shards one by one."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [child for each in lists if len(each) > 1 and len({type(child) for child in each}) == 1 for child in each]


def _batch(samples: int, channels: int, sides: tuple[int, int], labels: LabelKind = "class", classes: int = 1) -> Batch:
    numbers = torch.zeros(samples, dtype=torch.int64)
    images = torch.zeros(samples, channels, *sides, dtype=torch.uint8)
    marks = None
    if labels == "mask":
        marks = torch.zeros(samples, *sides, dtype=torch.int16)
    elif labels == "classes":
        marks = torch.zeros(samples, classes, dtype=torch.uint8)
    elif labels == "boxes":
        marks = torch.zeros(samples, _BOXES, 5)
    return Batch(images, numbers, numbers, numbers, numbers == 0, step=0, epoch=0, micro=0, marks=marks)
