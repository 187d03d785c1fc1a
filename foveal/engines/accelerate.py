"""Engines on Accelerate, for fine-tuning: DDP, FSDP2 and its DeepSpeed plugin. Accelerate does not load data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk
from foveal.distributed.world import World
from foveal.engines import fsdp
from foveal.engines.base import (
    ReplicatedEngine,
    StepResult,
    autocast,
    buffer_chunks,
    pair_parameters,
)
from foveal.engines.config import EngineConfig
from foveal.engines.deepspeed import DeepSpeedEngine
from foveal.engines.linear_casts import make_linear_casts
from foveal.errors import LaunchError
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.optimizers import build_optimizer

# Environment variables of accelerate launch, and the equal value of engine.sharding.
_SHARDING_BY_LAUNCH_VARIABLE = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp2"}


def _create_accelerator(
    cfg: EngineConfig, world: World, accumulation_steps: int, plugin: DeepSpeedPlugin | None = None
) -> Accelerator:
    """Create an Accelerator of the settings, independent of earlier engines in this process.

    Raises: LaunchError if accelerate launch contradicts the settings, or if Accelerate's number of ranks is wrong.
    """
    for name, sharding in _SHARDING_BY_LAUNCH_VARIABLE.items():
        if os.environ.pop(name, "").lower() == "true" and cfg.sharding != sharding:
            raise LaunchError(
                f"accelerate launch says {name}=true, and engine.sharding is {cfg.sharding}; set "
                f"engine.sharding={sharding}, or launch without it"
            )
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - a singleton for the life of the process
    on_cpu = world.device.type == "cpu"
    accelerator = Accelerator(
        # Without cpu=True on a machine without a GPU, each of two launched processes counts one process; with cpu=True
        # there is no DeepSpeed, which gets gloo through the kwargs handler instead.
        cpu=on_cpu and plugin is None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and plugin is not None else None,
        deepspeed_plugin=plugin,
        mixed_precision="no",  # the engine sets the precision
        gradient_accumulation_steps=accumulation_steps,
    )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # the plugin sets it, for this Accelerator only
    if accelerator.num_processes != world.size:
        raise LaunchError(
            f"Accelerate counts {accelerator.num_processes} processes where the launcher started {world.size}; "
            f"start with --num_processes {world.size} and, on CPUs, --config_file configs/accelerate/cpu2.yaml"
        )
    return accelerator


class AccelerateDDPEngine(ReplicatedEngine):
    """DDP. Accelerate divides the loss by the accumulation steps; DDP averages gradients over ranks."""

    def _prepare(
        self, model: nn.Module, param_groups: list[dict[str, Any]], optim: OptimConfig
    ) -> tuple[nn.Module, GuardedOptimizer, torch.optim.Optimizer]:
        self._accelerator = _create_accelerator(self._cfg, self._world, self._accumulation_steps)
        guard = build_optimizer(param_groups, optim)
        self._linear_casts = make_linear_casts(model, self._cfg)
        return self._accelerator.prepare_model(model), guard, self._accelerator.prepare_optimizer(guard)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts microbatches as the loop does"
            with autocast(self.device, self._precision), self._linear_casts():
                yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            self._accelerator.backward(loss)


class AccelerateFSDP2Engine(AccelerateDDPEngine):
    """FSDP2. torch shards the blocks, because Accelerate's plugin shards on GPUs only."""

    def _prepare(
        self, model: nn.Module, param_groups: list[dict[str, Any]], optim: OptimConfig
    ) -> tuple[nn.Module, GuardedOptimizer, torch.optim.Optimizer]:
        self._accelerator = _create_accelerator(self._cfg, self._world, self._accumulation_steps)
        param_groups = fsdp.apply_fsdp(model.to(self.device), param_groups, self._world)
        guard = fsdp.build_sharded_optimizer(param_groups, optim)
        return model, guard, guard

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        cast(Any, self.model).set_requires_gradient_sync(last)
        with self._accelerator.accumulate(), autocast(self.device, self._precision):
            yield

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        pairs = pair_parameters(self._module, ema_prefix, source_prefix)
        fsdp.update_ema_sharded(self._module, pairs, lerp_weight * self._guard.step_applied)

    def state_chunks(self) -> list[TensorChunk]:
        return fsdp.sharded_parameter_chunks(self._module, self._guard) + buffer_chunks(self._module, self._world)

    def gather_full_state_dict(self) -> dict[str, Tensor]:
        return fsdp.gather_full_state_dict(self._module, self._world.rank)


class AccelerateDeepSpeedEngine(DeepSpeedEngine):
    """Accelerate's DeepSpeed plugin, which takes DeepSpeed's step inside the last backward."""

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> tuple[Any, Any]:
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        self._accelerator = _create_accelerator(self._cfg, self._world, config["gradient_accumulation_steps"], plugin)
        engine, wrapped = self._accelerator.prepare(model, optimizer)
        return engine, wrapped.optimizer

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts microbatches as the loop does"
            with self._linear_casts():
                yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> StepResult:
        return self._step_result()
