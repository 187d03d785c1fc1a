"""DeepSpeed behind the engine's verbs: ZeRO 0 to 3, on GPUs under NCCL or on CPUs under gloo."""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.distributed.engine import EngineConfig, Outcome, apply_lr, evaluating
from foveal.distributed.world import World
from foveal.errors import ConfigError
from foveal.optim import GuardedAdamW, OptimConfig, plain_adamw

_TAG = "engine"
_OURS = {"amp", "bf16", "fp16", "optimizer", "scheduler"}


def _library() -> ModuleType:
    """Import DeepSpeed the way this machine needs it."""
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    import deepspeed

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
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    clash = sorted(set(cfg.deepspeed) & (set(derived) - {"zero_optimization"} | _OURS))
    if clash:
        raise ConfigError(f"engine.deepspeed.{clash[0]} is derived by foveal from its own settings; remove it")
    extra = dict(cfg.deepspeed)
    zero = extra.pop("zero_optimization", {})
    if "stage" in zero:
        raise ConfigError("engine.deepspeed.zero_optimization.stage is engine.zero; set that")
    return derived | extra | {"zero_optimization": {"stage": cfg.zero, **zero}}


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
        deepspeed = _library()
        if cfg.compile and cfg.zero == 3:
            # A parameter that a module reads from its child is gathered by a hook that compiled code does not pass.
            for parameter in cast(Any, model).borrowed_parameters():
                deepspeed.zero.register_external_parameter(model, parameter)
        self._zero = cfg.zero
        self._guard = GuardedAdamW(groups, optim) if cfg.zero == 0 else None
        optimizer = self._guard or plain_adamw(groups, optim)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=settings(optim, cfg, world.size, at_once, accumulate),
            dist_init_required=False,
        )
        self.model: nn.Module = self._engine
        self.device = world.device
        self._gathered = deepspeed.zero.GatheredParameters
        self._full_fp32 = deepspeed.utils.safe_get_full_fp32_param

    def set_lr(self, lr: float) -> None:
        apply_lr(self._optimizer, lr)

    @contextmanager
    def micro(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def looking(self) -> AbstractContextManager[None]:
        return evaluating(self.model)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> Outcome:
        self._engine.step()
        if self._guard is not None:
            return Outcome(self._guard.applied, self._guard.norm)
        return Outcome(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()))

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag=_TAG)

    def weights(self) -> dict[str, Tensor]:
        whole = {}
        for name, parameter in self._engine.module.named_parameters():
            with self._gathered([parameter]):
                # The fp32 master where there is one: under bf16 the module's own copy has lost digits.
                master = self._full_fp32(parameter) if self._zero and parameter.requires_grad else None
                whole[name] = (parameter if master is None else master).detach().float().cpu().clone()
        return whole | {name: value.detach().float().cpu() for name, value in self._engine.module.named_buffers()}
