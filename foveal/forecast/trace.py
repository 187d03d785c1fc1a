"""Trace a step of a stage's own model and objective on fake tensors, which have sizes and no memory.

Every operator of a microbatch runs in order, so that tensors saved by autograd, recomputation and lifetimes are
counted, not estimated.
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

from foveal.data.batch import Batch
from foveal.engines.base import autocast
from foveal.engines.config import Precision
from foveal.errors import ConfigError
from foveal.models.backbone import has_batch_norm
from foveal.optim.config import OptimConfig
from foveal.training.loop import TrainingSetup
from foveal.training.meta_build import build_on_meta, checkpoint_bytes, count_hidden_matrices, count_trainable

# Fused attention on a CPU saves the same tensors as on a GPU: queries, keys, values, output and log-sum-exp.
_DEVICE = torch.device("cpu")

SetupBuilder = Callable[[torch.device], TrainingSetup]


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of trained elements, and bytes of frozen tensors.

    ``linear_trainable`` counts linear and convolution layers, ``hidden_matrices`` the matrices that the optimizer
    updates by a rule of their own; ``trainable_tensor_numels`` and ``block_numels`` are elements per
    trained parameter and per repeated block. ``checkpoint_bytes`` is the size of a checkpoint;
    ``min_microbatch_size`` is 2 with BatchNorm.
    """

    trainable: int
    linear_trainable: int
    trainable_tensor_numels: tuple[int, ...]
    block_numels: tuple[int, ...]
    frozen_bytes: int
    checkpoint_bytes: int
    can_recompute: bool = True
    min_microbatch_size: int = 1
    hidden_matrices: int = 0


@dataclass(frozen=True, slots=True)
class MemoryTrace:
    """Bytes of a microbatch besides weights and finished gradients.

    ``peak_by_gradient_bytes`` maps bytes of finished gradients to the peak bytes alive meanwhile.
    """

    peak_by_gradient_bytes: dict[int, int]

    def peak_bytes_with_engine(self, engine_bytes: Callable[[int], float]) -> float:
        """Return the peak with an engine that holds ``engine_bytes(done)`` at ``done`` bytes of finished gradients."""
        return max(alive + engine_bytes(done) for done, alive in self.peak_by_gradient_bytes.items())


@dataclass(frozen=True, slots=True)
class SampleFlops:
    """FLOPs of a sample, 2 per multiply-add, without recomputation."""

    forward: float
    forward_backward: float


def count_parameters(build_setup: SetupBuilder, optim: OptimConfig) -> ParameterCounts:
    """Count the parameters of a stage's model, and of its frozen modules."""
    setup = build_on_meta(build_setup)
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in setup.model.parameters() if not parameter.requires_grad]
    linear = [module for module in setup.model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    linear_parameters = [parameter for module in linear for parameter in module.parameters(recurse=False)]
    return ParameterCounts(
        trainable=count_trainable(setup.model),
        linear_trainable=sum(parameter.numel() for parameter in linear_parameters if parameter.requires_grad),
        trainable_tensor_numels=tuple(parameter.numel() for parameter in trained),
        block_numels=tuple(
            sum(parameter.numel() for parameter in block.parameters()) for block in _find_blocks(setup.model)
        ),
        frozen_bytes=sum(tensor.nbytes for tensor in (*frozen, *setup.model.buffers(), *_frozen_tensors(setup))),
        checkpoint_bytes=checkpoint_bytes(setup, optim),
        can_recompute=_can_recompute(setup.model),
        min_microbatch_size=2 if has_batch_norm(setup.model) else 1,
        hidden_matrices=count_hidden_matrices(setup),
    )


def _frozen_tensors(setup: TrainingSetup) -> list[Tensor]:
    """Return parameters and buffers of the setup's frozen modules."""
    return [tensor for module in setup.frozen_modules for tensor in (*module.parameters(), *module.buffers())]


def _can_recompute(model: Any) -> bool:
    try:
        model.set_grad_checkpointing(enable=True)
    except (AttributeError, ConfigError):
        return False
    return True


def count_sample_flops(
    build_setup: SetupBuilder,
    channels: int,
    image_hw: tuple[int, int],
    example_targets: Tensor | None = None,
) -> SampleFlops:
    """Count forward and backward FLOPs of one sample of (height, width), with targets like these [1, ...].

    Attention is counted as plain matrix products, without the recomputation in a fused kernel's backward.
    """
    setup = build_on_meta(build_setup)
    with _on_fake_tensors(setup) as model, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        batch = _fake_batch(2, channels, image_hw, example_targets)  # BatchNorm cannot train on one sample
        total, _ = setup.objective(model, batch)
        forward = counter.get_total_flops()
        total.backward()
    return SampleFlops(forward / 2, counter.get_total_flops() / 2)


def trace_microbatch_memory(
    build_setup: SetupBuilder,
    microbatch_size: int,
    channels: int,
    image_hw: tuple[int, int],
    example_targets: Tensor | None = None,
    *,
    precision: Precision,
    recompute: bool,
) -> MemoryTrace:
    """Trace the memory of one microbatch."""
    setup = build_on_meta(build_setup)
    with _on_fake_tensors(setup) as model:
        if recompute:
            cast(Any, model).set_grad_checkpointing(enable=True)
        tracer = _MemoryTracer([*model.parameters(), *model.buffers(), *_frozen_tensors(setup)])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(tracer.on_gradient_ready)
        with tracer, autocast(_DEVICE, precision):
            total, _ = setup.objective(model, _fake_batch(microbatch_size, channels, image_hw, example_targets))
            with autocast(_DEVICE, "fp32"):
                total.backward()
    return MemoryTrace(tracer.peak_by_gradient_bytes)


class _MemoryTracer(TorchDispatchMode):
    """Count the bytes of living storages that were allocated under this mode; ``excluded`` are not counted."""

    def __init__(self, excluded: list[Tensor]) -> None:
        super().__init__()
        self.peak_by_gradient_bytes: dict[int, int] = {}
        self._alive_bytes = 0
        self._gradient_bytes = 0
        self._storages: dict[int, weakref.ref] = {}
        self._excluded = {_storage_key(tensor) for tensor in excluded}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track_storage(leaf)
        return out

    def on_gradient_ready(self, parameter: Tensor) -> None:
        """Count a finished gradient as the engine's, and release it."""
        assert parameter.grad is not None
        self._gradient_bytes += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        self._record_peak()

    def _track_storage(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_key(tensor)
        if key in self._storages or key in self._excluded:
            return
        size = storage.nbytes()
        self._alive_bytes += size
        self._storages[key] = weakref.ref(storage, functools.partial(self._on_storage_freed, key, size))
        self._record_peak()

    def _record_peak(self) -> None:
        peak = self.peak_by_gradient_bytes.get(self._gradient_bytes, 0)
        self.peak_by_gradient_bytes[self._gradient_bytes] = max(peak, self._alive_bytes)

    def _on_storage_freed(self, key: int, size: int, _reference: Any) -> None:
        self._alive_bytes -= size
        del self._storages[key]


def _storage_key(tensor: Tensor) -> int:
    """Return the identity of a living storage."""
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - a fake storage has no address


@contextmanager
def _on_fake_tensors(setup: TrainingSetup) -> Iterator[nn.Module]:
    """Yield the setup's model in training mode, on fake tensors that behave like CPU tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in setup.frozen_modules:
            module.to_empty(device=_DEVICE)
        yield setup.model.to_empty(device=_DEVICE).train()


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 shards one by one: children of lists of two or more modules of one type."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [
        child
        for children in lists
        if len(children) > 1 and len({type(child) for child in children}) == 1
        for child in children
    ]


def _fake_batch(
    batch_size: int, channels: int, image_size: tuple[int, int], example_targets: Tensor | None = None
) -> Batch:
    zeros = torch.zeros(batch_size, dtype=torch.int64)
    images = torch.zeros(batch_size, channels, *image_size, dtype=torch.uint8)
    targets = None
    if example_targets is not None:
        targets = torch.zeros(batch_size, *example_targets.shape[1:], dtype=example_targets.dtype)
    return Batch(images, zeros, zeros, zeros, zeros == 0, step=0, epoch=0, microbatch_index=0, targets=targets)
