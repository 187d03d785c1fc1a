"""What turns a loss into an update: the verbs that three engines share, their settings, and the reference engine."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk, replicated_chunk
from foveal.config import Config, machine, science
from foveal.distributed.world import World
from foveal.optim.optimizers import GuardedOptimizer, get_moments, get_num_updates, set_num_updates

Precision = Literal["fp32", "bf16"]


class EngineConfig(Config):
    """How the update is computed; nothing here changes it beyond rounding."""

    kind: Literal["deepspeed", "accelerate", "plain"] = machine(
        "deepspeed", "The library behind the update; plain is one process."
    )
    sharding: Literal["ddp", "fsdp2", "deepspeed"] = machine(
        "ddp", "What engine.kind=accelerate leaves on each rank: everything, shards of FSDP2, or what engine.zero says."
    )
    zero: Literal[0, 1, 2, 3] = machine(1, "DeepSpeed's ZeRO stage: what is partitioned over ranks.")
    precision: Precision = machine("fp32", "bf16: products in bf16 under autocast; weights are fp32 either way.")
    matmul: Literal["highest", "high", "medium"] = machine(
        "highest", "torch's float32 matmul precision; 'medium' may mean bf16 products on some processors."
    )
    compile: bool = machine(False, "Compile the model in place with torch.compile.")
    recompute: bool = machine(
        False, "Recompute each block's activations in the backward pass: less memory, same result."
    )
    timeout_minutes: float = machine(30.0, "How long a collective may take before the rank gives up.", gt=0)
    deepspeed: dict[str, Any] = science(
        {}, "Further keys for DeepSpeed's settings; those that foveal derives are refused."
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of an update: whether it was applied, and the gradient norm over all ranks before clipping."""

    applied: bool
    grad_norm: float


class Engine(Protocol):
    """The verbs. ``model`` is called by objectives and never reached into."""

    model: nn.Module
    device: torch.device

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update; each group multiplies it by its ``lr_scale``."""
        ...

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around one forward and backward; gradients are reduced over ranks in the last one of a step."""
        ...

    def eval_mode(self) -> AbstractContextManager[None]:
        """Around forwards without a backward: evaluation mode, no gradients, the engine's precision.

        Every rank enters it, and takes rank 0's buffers: running statistics are of what a rank has seen, and an
        evaluation would be by as many models as there are ranks.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the mean over the micros of a step: the engine divides by their number, nobody else does."""
        ...

    def step(self) -> StepResult:
        """Clip, update, clear; on every rank, whatever the gradients are."""
        ...

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        """Move what is frozen under the names that begin with ``onto`` by this share towards what ``of`` names; every rank."""
        ...

    def state_chunks(self) -> list[TensorChunk]:
        """What this rank holds of every tensor, as live views: fp32 weights, moments (zeros before the first update), buffers."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates applied so far; a skipped step is none."""
        ...

    def on_state_loaded(self, num_updates: int) -> None:
        """After the pieces were filled: hand them to whatever was computed from them, count updates from here.

        Every rank calls it. Groups keep their own settings: a checkpoint has none.
        """
        ...

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights by the module's own names, fp32 (counts int64) on the CPU, whole on rank 0; every rank calls it.

        They may share memory with the live weights: write them before the next step.
        """
        ...


def apply_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 products where asked for; fp32 also inside of it, as for a backward, whose types the forward has chosen."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def eval_with_rank0_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Evaluation mode without gradients, with rank 0's buffers, and back to training."""
    world.broadcast_tensors_(list(persistent_buffers(model).values()))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def pair_parameters(module: nn.Module, ema_prefix: str, source_prefix: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters under one prefix, each with its namesake under another."""
    named = dict(module.named_parameters())
    return [
        (each, named[source_prefix + name.removeprefix(ema_prefix)])
        for name, each in named.items()
        if name.startswith(ema_prefix)
    ]


@torch.no_grad()
def update_ema_replicated(module: nn.Module, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
    """``Engine.average`` where a rank holds all weights: nothing is communicated."""
    for average, parameter in pair_parameters(module, ema_prefix, source_prefix):
        average.lerp_(parameter, lerp_weight)


def replicated_parameter_chunks(module: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> list[TensorChunk]:
    """The pieces of all parameters, where every rank holds them whole."""
    return [
        replicated_chunk(
            name,
            {"weight": value} | (get_moments(optimizer, value) if value.requires_grad else {}),
            world.rank,
            world.size,
        )
        for name, value in module.named_parameters()
    ]


def buffer_chunks(module: nn.Module, world: World) -> list[TensorChunk]:
    """The pieces of what a module keeps beside its parameters: rank 0's, which no other rank need have equal."""
    return [
        replace(replicated_chunk(name, {"weight": value}, 0, 1), **({} if world.rank == 0 else {"write_range": (0, 0)}))
        for name, value in persistent_buffers(module).items()
    ]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a file holds: not those that are computed anew with the module."""
    kept = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in kept}


def to_export_tensor(value: Tensor) -> Tensor:
    """A weight as exports have it: fp32 on the CPU; what counts stays whole numbers."""
    return (value.detach().float() if value.is_floating_point() else value.detach()).cpu()


class ReplicatedEngine:
    """What Plain and Accelerate share: every rank holds all weights and moments, and the optimizer guards itself."""

    def __init__(self, module: nn.Module, optimizer: GuardedOptimizer, cfg: EngineConfig, world: World) -> None:
        self.device = world.device
        self.model = module
        self._module = module
        self._guard = optimizer
        self._optimizer: torch.optim.Optimizer = optimizer
        self._precision: Precision = cfg.precision
        self._world = world

    def set_lr(self, lr: float) -> None:
        apply_lr(self._guard, lr)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        with eval_with_rank0_buffers(self.model, self._world), autocast(self.device, self._precision):
            yield

    def step(self) -> StepResult:
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepResult(self._guard.step_applied, self._guard.grad_norm)

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        update_ema_replicated(self._module, ema_prefix, source_prefix, lerp_weight)

    def state_chunks(self) -> list[TensorChunk]:
        return replicated_parameter_chunks(self._module, self._guard, self._world) + buffer_chunks(
            self._module, self._world
        )

    @property
    def num_updates(self) -> int:
        return get_num_updates(self._guard)

    def on_state_loaded(self, num_updates: int) -> None:
        set_num_updates(self._guard, num_updates)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: to_export_tensor(value) for name, value in self._module.state_dict().items()}
