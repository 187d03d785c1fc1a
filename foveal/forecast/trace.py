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
from foveal.models.backbone import has_batch_norm
from foveal.training.loop import TrainingSetup

# A processor's fused attention saves what a GPU's does: queries, keys, values, the output and its logarithmic sums.
_DEVICE = torch.device("cpu")
_META = torch.device("meta")
_BOXES = 16  # of an image that nobody has seen

SetupBuilder = Callable[[torch.device], TrainingSetup]


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many numbers are trained (``products``: those of linear layers), and the bytes of what is not trained.

    ``sizes`` are those of every trained parameter, ``blocks`` those of every repeated block; ``kept_bytes`` are the
    untrained tensors of the model that a checkpoint holds. ``recomputes``: whether activations can be recomputed;
    ``fewest``: the fewest images at once that it can learn from.
    """

    trainable: int
    linear_trainable: int
    tensor_sizes: tuple[int, ...]
    block_sizes: tuple[int, ...]
    frozen_bytes: int
    frozen_checkpoint_bytes: int
    can_recompute: bool = True
    min_batch_size: int = 1


@dataclass(frozen=True, slots=True)
class MemoryTrace:
    """The bytes of a micro besides weights and finished gradients.

    ``moments``: for so many bytes of finished gradients, the most that lived meanwhile.
    """

    peak_by_gradient_bytes: dict[int, int]

    def peak_bytes(self, engine_bytes: Callable[[int], float]) -> float:
        """The most at once, if ``kept(done)`` bytes are what an engine keeps while ``done`` bytes of gradients are done."""
        return max(alive + engine_bytes(done) for done, alive in self.peak_by_gradient_bytes.items())


@dataclass(frozen=True, slots=True)
class SampleFlops:
    """Floating-point operations of a sample, two for a multiplication and an addition, without recomputation."""

    forward: float
    forward_backward: float


def count_parameters(build_setup: SetupBuilder) -> ParameterCounts:
    """Count a stage's model and its frozen companions."""
    parts = _build_on_meta(build_setup)
    trained = [each for each in parts.model.parameters() if each.requires_grad]
    linear = [module for module in parts.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    still = [each for each in parts.model.parameters() if not each.requires_grad]
    buffers = dict(parts.model.named_buffers())
    saved = [buffers[name] for name in parts.model.state_dict() if name in buffers]
    companions = [each for module in parts.frozen_modules for each in (*module.parameters(), *module.buffers())]
    return ParameterCounts(
        trainable=sum(each.numel() for each in trained),
        linear_trainable=sum(
            each.numel() for module in linear for each in module.parameters(recurse=False) if each.requires_grad
        ),
        tensor_sizes=tuple(each.numel() for each in trained),
        block_sizes=tuple(sum(each.numel() for each in block.parameters()) for block in _find_blocks(parts.model)),
        frozen_bytes=sum(each.nbytes for each in (*still, *buffers.values(), *companions)),
        frozen_checkpoint_bytes=sum(each.nbytes for each in (*still, *saved)),
        can_recompute=_can_recompute(parts.model),
        min_batch_size=2 if has_batch_norm(parts.model) else 1,
    )


def _can_recompute(model: Any) -> bool:
    try:
        model.set_grad_checkpointing(enable=True)
    except (AttributeError, ConfigError):
        return False
    return True


def count_flops(
    build_setup: SetupBuilder,
    channels: int,
    image_size: tuple[int, int],
    label_kind: LabelKind = "class",
    num_classes: int = 1,
) -> SampleFlops:
    """Count the forward and backward of one sample of these channels and (height, width), with labels of this kind.

    Attention is counted as plain matrix products: what a fused kernel computes twice in its backward is not work done.
    """
    parts = _build_on_meta(build_setup)
    with _on_fake_tensors(parts) as model, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total, _ = parts.objective(
            model, _fake_batch(2, channels, image_size, label_kind, num_classes)
        )  # BatchNorm learns nothing from one
        forward = counter.get_total_flops()
        total.backward()
    return SampleFlops(forward / 2, counter.get_total_flops() / 2)


def trace_memory(
    build_setup: SetupBuilder,
    batch_size: int,
    channels: int,
    image_size: tuple[int, int],
    label_kind: LabelKind = "class",
    num_classes: int = 1,
    *,
    precision: Precision,
    recompute: bool,
) -> MemoryTrace:
    """Follow one micro of so many samples."""
    parts = _build_on_meta(build_setup)
    with _on_fake_tensors(parts) as model:
        if recompute:
            cast(Any, model).set_grad_checkpointing(enable=True)
        known = [*model.parameters(), *model.buffers()]
        known += [each for module in parts.frozen_modules for each in (*module.parameters(), *module.buffers())]
        watch = _MemoryTracer(known)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(watch.on_gradient_ready)
        with watch, autocast(_DEVICE, precision):
            total, _ = parts.objective(model, _fake_batch(batch_size, channels, image_size, label_kind, num_classes))
            with autocast(_DEVICE, "fp32"):
                total.backward()
    return MemoryTrace(watch.peak_by_gradient_bytes)


class _MemoryTracer(TorchDispatchMode):
    """Counts the bytes of storages that were made since, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak_by_gradient_bytes: dict[int, int] = {}
        self._alive = self._done = 0
        self._storages: dict[int, weakref.ref] = {}
        self._known = {_storage_key(each) for each in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track_storage(leaf)
        return out

    def on_gradient_ready(self, parameter: Tensor) -> None:
        """A gradient is whole, and no longer the micro's."""
        assert parameter.grad is not None
        self._done += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self._record_peak()

    def _track_storage(self, tensor: Tensor) -> None:
        storage, place = tensor.untyped_storage(), _storage_key(tensor)
        if place in self._storages or place in self._known:
            return
        size = storage.nbytes()
        self._alive += size
        self._storages[place] = weakref.ref(storage, functools.partial(self._on_storage_freed, place, size))
        self._record_peak()

    def _record_peak(self) -> None:
        self.peak_by_gradient_bytes[self._done] = max(self.peak_by_gradient_bytes.get(self._done, 0), self._alive)

    def _on_storage_freed(self, place: int, size: int, _reference: Any) -> None:
        self._alive -= size
        del self._storages[place]


def _storage_key(tensor: Tensor) -> int:
    """What distinguishes a living storage from all others."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - a fake storage has no address


def _build_on_meta(build: SetupBuilder) -> TrainingSetup:
    """The parts of a stage on the meta device, where weights cost nothing and reading them into it does nothing."""
    with torch.random.fork_rng(devices=[]), _META, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(_META)


@contextmanager
def _on_fake_tensors(parts: TrainingSetup) -> Iterator[nn.Module]:
    """The parts' model, training, among fake tensors that behave as on a processor."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in parts.frozen_modules:
            module.to_empty(device=_DEVICE)
        yield parts.model.to_empty(device=_DEVICE).train()


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """The children of lists of modules of one type: what FSDP2 shards one by one."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [child for each in lists if len(each) > 1 and len({type(child) for child in each}) == 1 for child in each]


def _fake_batch(
    samples: int, channels: int, image_size: tuple[int, int], labels: LabelKind = "class", classes: int = 1
) -> Batch:
    numbers = torch.zeros(samples, dtype=torch.int64)
    images = torch.zeros(samples, channels, *image_size, dtype=torch.uint8)
    marks = None
    if labels == "mask":
        marks = torch.zeros(samples, *image_size, dtype=torch.int16)
    elif labels == "classes":
        marks = torch.zeros(samples, classes, dtype=torch.uint8)
    elif labels == "boxes":
        marks = torch.zeros(samples, _BOXES, 5)
    return Batch(images, numbers, numbers, numbers, numbers == 0, step=0, epoch=0, microbatch_index=0, targets=marks)
