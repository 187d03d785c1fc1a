"""DeepSpeed behind the engine's verbs: ZeRO 0 to 3, on GPUs under NCCL or on CPUs under gloo."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import Piece
from foveal.distributed.world import World
from foveal.engines.base import (
    EngineConfig,
    Outcome,
    apply_lr,
    average_whole,
    buffers,
    evaluating,
    exported,
    followed,
    kept_buffers,
    whole_parameters,
)
from foveal.engines.zero import average_shards, refresh, sharded_parameters
from foveal.errors import ConfigError
from foveal.optim.optimizers import GuardedAdamW, OptimConfig, count_from, plain_adamw, updates_of

_OFFLOAD = ("offload_optimizer", "offload_param")
_OURS = {"amp", "bf16", "fp16", "optimizer", "scheduler"}


def library() -> ModuleType:
    """Import DeepSpeed the way this machine needs it."""
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of a machine without a GPU it would warn in the middle of our sentences
    import deepspeed

    logging.disable(before)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # A shared-memory all-reduce that DeepSpeed would compile at the first start (25 s, and it dies where ninja or
        # c++ is not on PATH). gloo serves as well on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def settings(optim: OptimConfig, cfg: EngineConfig, ranks: int, at_once: int, accumulate: int) -> dict[str, Any]:
    """DeepSpeed's settings, derived. ``engine.deepspeed`` may add keys and not contradict.

    Errors: ConfigError for a key that foveal derives, or that would take precision or the optimizer out of its hands.
    """
    derived: dict[str, Any] = {
        "train_batch_size": at_once * accumulate * ranks,
        "train_micro_batch_size_per_gpu": at_once,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": (optim.clip or 0.0) if cfg.zero else 0.0,
        "zero_optimization": {"stage": cfg.zero},
        # fp32 weights under autocast, as in the other engines. DeepSpeed's own bf16 section trains bf16 weights: an
        # update below half a unit in the last place does not reach the forward, and the curve is another (17 % off seen).
        "torch_autocast": {"enabled": cfg.precision == "bf16", "dtype": "bfloat16"},
        "zero_force_ds_cpu_optimizer": False,  # AdamW is foveal's, also where updates are offloaded to the host
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    clash = sorted(set(cfg.deepspeed) & (set(derived) - {"zero_optimization"} | _OURS))
    if clash:
        raise ConfigError(f"engine.deepspeed.{clash[0]} is derived by foveal from its own settings; remove it")
    extra = dict(cfg.deepspeed)
    zero = extra.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.deepspeed.zero_optimization: a mapping of settings is expected (given: {zero!r})")
    if "stage" in zero:
        raise ConfigError("engine.deepspeed.zero_optimization.stage is engine.zero; set that")
    _refuse_hidden_states(zero)
    return derived | extra | {"zero_optimization": {"stage": cfg.zero, **zero}}


def _refuse_hidden_states(zero: dict[str, Any]) -> None:
    """What keeps weights or moments where a checkpoint does not find them, or lets NaN pass. Errors: ConfigError."""
    where = "engine.deepspeed.zero_optimization"
    offload = {name: zero[name] for name in _OFFLOAD if isinstance(zero.get(name), dict)}
    for name, each in offload.items():
        if each.get("device") == "nvme":
            raise ConfigError(
                f"{where}.{name}.device=nvme: foveal's checkpoints do not reach what lies on a drive; use cpu"
            )
    for name, there in (("zenflow", zero), ("super_offload", offload.get("offload_optimizer", {}))):
        if there.get(name):
            raise ConfigError(f"{where}: {name} keeps states that foveal's checkpoints do not reach; remove it")
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(f"{where}.compute_grad_norm=false: DeepSpeed skips a step by its norm alone; remove it")


class DeepSpeed:
    """The adapter. DeepSpeed divides the loss by the accumulation count and averages gradients over ranks."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        cfg: EngineConfig,
        world: World,
        at_once: int,
        accumulate: int,
    ) -> None:
        deepspeed = library()
        if cfg.compile and cfg.zero == 3:
            # A parameter that a module reads from its child is gathered by a hook that compiled code does not pass.
            for parameter in cast(Any, model).borrowed_parameters():
                deepspeed.zero.register_external_parameter(model, parameter)
        self._zero, self._world = cfg.zero, world
        self._guard = GuardedAdamW(groups, optim) if cfg.zero == 0 else None
        optimizer = self._guard or plain_adamw(groups, optim)
        self._engine, self._optimizer = self._begun(
            model, optimizer, settings(optim, cfg, world.size, at_once, accumulate), world
        )
        self.model: nn.Module = self._engine
        self.device = world.device
        self._gathered = deepspeed.zero.GatheredParameters
        self._full_fp32 = deepspeed.utils.safe_get_full_fp32_param

    def _begun(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World
    ) -> tuple[Any, Any]:
        """DeepSpeed's engine and its optimizer."""
        return library().initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[:2]

    def set_lr(self, lr: float) -> None:
        apply_lr(self._optimizer, lr)

    @contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def looking(self) -> AbstractContextManager[None]:
        return evaluating(self.model, self._world)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> Outcome:
        self._engine.step()
        return self._outcome()

    def _outcome(self) -> Outcome:
        if self._guard is not None:
            return Outcome(self._guard.applied, self._guard.norm)
        return Outcome(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()))

    def average(self, onto: str, of: str, weight: float) -> None:
        if self._zero == 3:
            average_shards(self._optimizer, followed(self._engine.module, onto, of), weight)
        else:
            average_whole(self._engine.module, onto, of, weight)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """AdamW itself, on flat partitions where there are any."""
        return self._guard or cast(Any, self._optimizer).optimizer

    def pieces(self) -> list[Piece]:
        module = self._engine.module
        if self._guard is not None:
            return whole_parameters(module, self._guard, self._world) + buffers(module, self._world)
        return sharded_parameters(module, self._optimizer, self._zero, self._world) + buffers(module, self._world)

    @property
    def updates(self) -> int:
        return updates_of(self._adamw)

    def restored(self, updates: int) -> None:
        count_from(self._adamw, updates)
        if self._zero:
            refresh(self._optimizer, self._zero)

    def weights(self) -> dict[str, Tensor]:
        whole = {}
        for name, parameter in self._engine.module.named_parameters():
            with self._gathered([parameter]):
                # The fp32 master where there is one: under bf16 the module's own copy has lost digits.
                master = self._full_fp32(parameter) if self._zero and parameter.requires_grad else None
                whole[name] = (parameter if master is None else master).detach().float().cpu().clone()
        return whole | {name: exported(value) for name, value in kept_buffers(self._engine.module).items()}
