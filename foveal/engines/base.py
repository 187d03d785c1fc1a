"""The engine protocol, the engine settings, and the base of engines with replicated weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk, replicated_chunk
from foveal.distributed.world import World
from foveal.engines.compiling import eager_forwards
from foveal.engines.config import EngineConfig, Precision
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import get_or_create_moments
from foveal.optim.optimizers import get_num_updates, set_num_updates


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of an optimizer step: whether it was applied, and the global gradient norm before clipping.

    Scalars on the device, equal on every rank: whoever reads them waits for the step.
    """

    applied: Tensor
    grad_norm: Tensor


class Engine(Protocol):
    """What the training loop needs of an engine. Objectives call ``model`` and do not access its internals."""

    model: nn.Module
    device: torch.device

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update; each group multiplies it by its ``lr_scale``."""
        ...

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of a forward and backward; gradients are reduced over ranks in the last microbatch of a step."""
        ...

    def eval_mode(self) -> AbstractContextManager[None]:
        """Context of forwards without a backward: evaluation mode, no gradients, the engine's precision, not compiled.

        A collective that gives every rank rank 0's buffers: running statistics differ between ranks, and an evaluation
        must use the same model on all of them.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; the engine divides the loss by the number of microbatches in a step."""
        ...

    def step(self) -> StepResult:
        """Clip gradients, update, clear gradients. Every rank calls it, also with non-finite gradients."""
        ...

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        """Interpolate the parameters under ``ema_prefix`` to those under ``source_prefix``; every rank calls it.

        If the last update was refused, nothing changes: the weight is multiplied by ``StepResult.applied``.
        """
        ...

    def state_chunks(self) -> list[TensorChunk]:
        """Return this rank's part of every tensor as live views: fp32 weights, moments (zeros at first), buffers."""
        ...

    @property
    def num_updates(self) -> int:
        """Number of applied updates, without skipped steps; reading it waits for the device."""
        ...

    def on_state_loaded(self, num_updates: int) -> None:
        """Update all state that is derived from the chunks, after they were filled, and set the update count.

        Every rank calls it. Parameter groups keep their settings, which a checkpoint does not contain.
        """
        ...

    def gather_full_state_dict(self) -> dict[str, Tensor]:
        """Return all weights under the module's names on rank 0: fp32 (counters int64), on the CPU.

        Every rank calls it; the others return nothing, so that a node's memory takes one copy and not one per GPU. The
        tensors may share memory with the live weights: write them before the next step.
        """
        ...


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return an autocast context: bf16 products, or for fp32 none.

    fp32 also disables an outer autocast, as for a backward, whose types the forward has chosen.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def eval_with_rank0_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Enter evaluation mode without gradients, with rank 0's buffers; return to training mode at the end."""
    world.broadcast_tensors_(list(persistent_buffers(model).values()))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def pair_parameters(module: nn.Module, ema_prefix: str, source_prefix: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return (EMA parameter, source parameter) for every parameter name under ``ema_prefix``."""
    parameters = dict(module.named_parameters())
    return [
        (parameter, parameters[source_prefix + name.removeprefix(ema_prefix)])
        for name, parameter in parameters.items()
        if name.startswith(ema_prefix)
    ]


def lerp_all_(pairs: Sequence[tuple[Tensor, Tensor]], weight: Tensor) -> None:
    """Interpolate each first tensor of ``pairs`` in place to the second, by a scalar on the device.

    Bit for bit ``Tensor.lerp_`` with a number, in one operation.
    """
    averages, sources = zip(*pairs, strict=True)
    torch._foreach_lerp_(averages, sources, [weight] * len(averages))


@torch.no_grad()
def update_ema_replicated(module: nn.Module, ema_prefix: str, source_prefix: str, lerp_weight: Tensor) -> None:
    """Update the EMA where every rank holds all weights; without communication."""
    lerp_all_(pair_parameters(module, ema_prefix, source_prefix), lerp_weight)


def replicated_parameter_chunks(module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> list[TensorChunk]:
    """Return the chunks of all parameters where every rank holds all weights."""
    return [
        replicated_chunk(
            name,
            {"weight": value} | (get_or_create_moments(optimizer, value) if value.requires_grad else {}),
            world.rank,
            world.size,
        )
        for name, value in module.named_parameters()
    ]


def buffer_chunks(module: nn.Module, world: World) -> list[TensorChunk]:
    """Return the chunks of a module's buffers. Only rank 0 writes its buffers; other ranks' buffers may differ."""
    chunks = []
    for name, value in persistent_buffers(module).items():
        chunk = replicated_chunk(name, {"weight": value}, 0, 1)
        chunks.append(chunk if world.rank == 0 else replace(chunk, relative_write_range=(0, 0)))
    return chunks


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module's state dict, without those that the constructor computes."""
    stored_names = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in stored_names}


def to_fp32_cpu_tensor(value: Tensor) -> Tensor:
    """Return a tensor in the form of exports: on the CPU, floats as fp32, integers unchanged."""
    return (value.detach().float() if value.is_floating_point() else value.detach()).cpu()


class ReplicatedEngine:
    """Base of the plain and Accelerate engines: every rank holds all weights and moments, with a guarded optimizer."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulation_steps: int,
    ) -> None:
        self.device = world.device
        self._module = model
        self._cfg = cfg
        self._precision: Precision = cfg.precision
        self._world = world
        self._accumulation_steps = accumulation_steps
        self.model, self._guard, self._optimizer = self._prepare(model, param_groups, optim)

    def _prepare(
        self, model: nn.Module, param_groups: list[dict[str, Any]], optim: OptimConfig
    ) -> tuple[nn.Module, GuardedOptimizer, torch.optim.Optimizer]:
        """Place the model on the device; return the model to call, the guarded optimizer, and the optimizer to step."""
        raise NotImplementedError

    def set_lr(self, lr: float) -> None:
        apply_lr(self._guard, lr)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        with (
            eager_forwards(self._cfg),
            eval_with_rank0_buffers(self.model, self._world),
            autocast(self.device, self._precision),
        ):
            yield

    def step(self) -> StepResult:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(self._guard.step_applied, self._guard.grad_norm)

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        update_ema_replicated(self._module, ema_prefix, source_prefix, lerp_weight * self._guard.step_applied)

    def state_chunks(self) -> list[TensorChunk]:
        return replicated_parameter_chunks(self._module, self._guard, self._world) + buffer_chunks(
            self._module, self._world
        )

    @property
    def num_updates(self) -> int:
        return get_num_updates(self._guard)

    def on_state_loaded(self, num_updates: int) -> None:
        set_num_updates(self._guard, num_updates)

    def gather_full_state_dict(self) -> dict[str, Tensor]:
        if self._world.rank:
            return {}
        return {name: to_fp32_cpu_tensor(value) for name, value in self._module.state_dict().items()}
