"""Accelerate behind the engine's verbs, for fine-tuning: DDP, FSDP2 or its DeepSpeed plugin. It is never given the loader."""

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
from foveal.engines.base import EngineConfig, ReplicatedEngine, StepResult, autocast, buffer_chunks, pair_parameters
from foveal.engines.deepspeed import DeepSpeedEngine
from foveal.errors import LaunchError
from foveal.optim.optimizers import OptimConfig, build_optimizer

# What accelerate launch tells its processes, and the setting that says the same.
_SHARDING_BY_LAUNCH_VARIABLE = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_FSDP": "fsdp2"}


def _create_accelerator(
    cfg: EngineConfig, world: World, accumulation_steps: int, plugin: DeepSpeedPlugin | None = None
) -> Accelerator:
    """Accelerate as the settings say, whatever an earlier engine of this process told it.

    Raises: LaunchError where accelerate launch says otherwise, or where it does not see the launcher's ranks.
    """
    for name, sharding in _SHARDING_BY_LAUNCH_VARIABLE.items():
        if os.environ.pop(name, "").lower() == "true" and cfg.sharding != sharding:
            raise LaunchError(
                f"accelerate launch says {name}=true, and engine.sharding is {cfg.sharding}; set engine.sharding={sharding}, "
                f"or launch without it"
            )
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - it keeps one for the life of a process
    on_cpu = world.device.type == "cpu"
    accelerator = Accelerator(
        # Without cpu=True on a machine without a GPU, each of two launched processes believes that it is alone; with it,
        # there is no DeepSpeed, which has to be told of gloo instead.
        cpu=on_cpu and plugin is None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and plugin is not None else None,
        deepspeed_plugin=plugin,
        mixed_precision="no",  # precision is the engine's
        gradient_accumulation_steps=accumulation_steps,
    )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # set by the plugin, for this one
    if accelerator.num_processes != world.size:
        raise LaunchError(
            f"Accelerate counts {accelerator.num_processes} processes where the launcher started {world.size}; "
            f"start with --num_processes {world.size} and, on CPUs, --config_file configs/accelerate/cpu2.yaml"
        )
    return accelerator


class AccelerateDDPEngine(ReplicatedEngine):
    """The adapter of DDP. Accelerate divides the loss by the accumulation count; DDP averages gradients over ranks."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulation_steps: int,
    ) -> None:
        self._accelerator = _create_accelerator(cfg, world, accumulation_steps)
        super().__init__(model, build_optimizer(param_groups, optim), cfg, world)
        self.model = self._accelerator.prepare_model(model)
        self._optimizer = self._accelerator.prepare_optimizer(self._guard)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts the micros of a step as the loop does"
            with autocast(self.device, self._precision):
                yield

    def backward(self, loss: Tensor) -> None:
        with autocast(self.device, "fp32"):
            self._accelerator.backward(loss)


class AccelerateFSDP2Engine(AccelerateDDPEngine):
    """The adapter of FSDP2: blocks are sharded by torch itself, since Accelerate's plugin does so on GPUs only."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        accumulation_steps: int,
    ) -> None:
        self._accelerator = _create_accelerator(cfg, world, accumulation_steps)
        param_groups = fsdp.apply_fsdp(model.to(world.device), param_groups, world)
        ReplicatedEngine.__init__(self, model, fsdp.build_sharded_optimizer(param_groups, optim), cfg, world)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        cast(Any, self.model).set_requires_gradient_sync(last)
        with self._accelerator.accumulate(), autocast(self.device, self._precision):
            yield

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        fsdp.update_ema_sharded(self._module, pair_parameters(self._module, ema_prefix, source_prefix), lerp_weight)

    def state_chunks(self) -> list[TensorChunk]:
        return fsdp.sharded_parameter_chunks(self._module, self._guard) + buffer_chunks(self._module, self._world)

    def full_state_dict(self) -> dict[str, Tensor]:
        return fsdp.gather_full_state_dict(self._module)


class AccelerateDeepSpeedEngine(DeepSpeedEngine):
    """The adapter of Accelerate's DeepSpeed plugin, which takes DeepSpeed's step inside the last backward."""

    def __init__(
        self,
        model: nn.Module,
        param_groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        microbatch_size: int,
        accumulation_steps: int,
    ) -> None:
        self._cfg = cfg
        super().__init__(model, param_groups, optim, cfg, world, microbatch_size, accumulation_steps)

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World
    ) -> tuple[Any, Any]:
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        self._accelerator = _create_accelerator(self._cfg, world, config["gradient_accumulation_steps"], plugin)
        engine, wrapped = self._accelerator.prepare(model, optimizer)
        return engine, wrapped.optimizer

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        with self._accelerator.accumulate(self.model):
            assert self._accelerator.sync_gradients == last, "Accelerate counts the micros of a step as the loop does"
            yield

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> StepResult:
        return self._step_result()
