"""The DeepSpeed engine: ZeRO 0 to 3, on GPUs under NCCL or on CPUs under gloo."""

import logging
import os
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.checkpoint.chunks import TensorChunk
from foveal.distributed.world import World
from foveal.engines.base import (
    StepResult,
    apply_lr,
    buffer_chunks,
    eval_with_rank0_buffers,
    pair_parameters,
    persistent_buffers,
    replicated_parameter_chunks,
    to_fp32_cpu_tensor,
    update_ema_replicated,
)
from foveal.engines.buckets import derive_zero_options
from foveal.engines.compiling import eager_forwards
from foveal.engines.config import EngineConfig
from foveal.engines.linear_casts import make_linear_casts
from foveal.engines.zero import (
    copy_master_weights_to_model,
    keep_weights_as_views,
    sharded_parameter_chunks,
    update_ema_sharded,
)
from foveal.engines.zero_guard import ZeroGuard, is_decided_on_device
from foveal.errors import ConfigError
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.optimizers import (
    build_optimizer,
    build_unguarded_optimizer,
    get_num_updates,
    set_num_updates,
)

_OFFLOAD_KEYS = ("offload_optimizer", "offload_param")
_RESERVED_KEYS = {"amp", "bf16", "fp16", "optimizer", "scheduler"}

_log = logging.getLogger(__name__)


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed without its warnings, and without its shared-memory all-reduce on machines without a GPU."""
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # DeepSpeed warns about a machine without a GPU
    with _hidden_module("mlflow"):  # its autotuner, which nothing here uses, imports it: two seconds of every rank
        import deepspeed

    logging.disable(disabled_level)
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # DeepSpeed would compile its shared-memory all-reduce at the first start (25 s, and a crash without ninja or
        # c++ on PATH). gloo is sufficient on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _hidden_module(name: str) -> Iterator[None]:
    """Let an import of a module that is not imported yet fail in this thread, as if it were not installed.

    Other threads import it as ever.
    """
    thread = threading.get_ident()

    class Hide(MetaPathFinder):
        def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> None:
            if fullname == name and threading.get_ident() == thread:
                raise ModuleNotFoundError(f"{name} is hidden", name=name)

    finder = Hide()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def build_deepspeed_config(
    optim: OptimConfig,
    cfg: EngineConfig,
    world_size: int,
    microbatch_size: int,
    accumulation_steps: int,
    trainable_numels: Collection[int] = (),
) -> dict[str, Any]:
    """Derive DeepSpeed's settings and add those of ``engine.deepspeed``.

    ``trainable_numels``: elements per trained parameter, from which ZeRO's buckets are derived; none for a check of the
    settings before a model is built.

    Raises: ConfigError for a key that foveal derives, or that would change the precision or the optimizer.
    """
    # Gradients of these modules are summed in autocast's type, and under ZeRO 3 their weights are gathered in it.
    safe_modules = {"lower_precision_safe_modules": []} if cfg.reduce_dtype == "fp32" else {}
    derived: dict[str, Any] = {
        "train_batch_size": microbatch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": microbatch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": (optim.max_grad_norm or 0.0) if cfg.zero else 0.0,
        "zero_optimization": {"stage": cfg.zero},
        # fp32 weights under autocast, as in the other engines. DeepSpeed's bf16 section trains bf16 weights: an update
        # below half a unit in the last place does not reach the forward, and the loss deviates (17 % measured).
        "torch_autocast": {"enabled": cfg.precision == "bf16", "dtype": "bfloat16"} | safe_modules,
        "zero_force_ds_cpu_optimizer": False,  # foveal's AdamW, also for updates offloaded to the host
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    clash = sorted(set(cfg.deepspeed) & (set(derived) - {"zero_optimization"} | _RESERVED_KEYS))
    if clash:
        raise ConfigError(f"engine.deepspeed.{clash[0]} is derived by foveal from its own settings; remove it")
    extra = dict(cfg.deepspeed)
    zero = extra.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.deepspeed.zero_optimization: a mapping of settings is expected (given: {zero!r})")
    if "stage" in zero:
        raise ConfigError("engine.deepspeed.zero_optimization.stage is engine.zero; set that")
    _check_zero_options(zero)
    options = derive_zero_options(cfg.zero, trainable_numels, world_size, zero)
    if cfg.zero < 3 and is_decided_on_device(optim, cfg.zero, zero):
        derived["gradient_clipping"] = 0.0  # the guard clips
        options["compute_grad_norm"] = False
    return derived | extra | {"zero_optimization": {"stage": cfg.zero, **options}}


def _check_zero_options(zero: dict[str, Any]) -> None:
    """Refuse options that hide weights or moments from checkpoints, or let NaN pass. Raises: ConfigError."""
    section = "engine.deepspeed.zero_optimization"
    offload = {name: zero[name] for name in _OFFLOAD_KEYS if isinstance(zero.get(name), dict)}
    for name, options in offload.items():
        if options.get("device") == "nvme":
            raise ConfigError(
                f"{section}.{name}.device=nvme: foveal's checkpoints do not reach tensors on a drive; use cpu"
            )
    for name, options in (("zenflow", zero), ("super_offload", offload.get("offload_optimizer", {}))):
        if options.get(name):
            raise ConfigError(f"{section}: {name} keeps states that foveal's checkpoints do not reach; remove it")
    if zero.get("compute_grad_norm", True) is not True:
        raise ConfigError(
            f"{section}.compute_grad_norm is derived by foveal, which needs a norm to skip a non-finite step; remove it"
        )


class DeepSpeedEngine:
    """DeepSpeed, which divides the loss by the accumulation steps and averages gradients over ranks."""

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
        deepspeed = import_deepspeed()
        if cfg.deepspeed.get("compile"):  # no error: runs that state it go on
            _log.warning(
                "engine.deepspeed.compile compiles nothing: DeepCompile reduces gradients in its own graphs, past the "
                "step that foveal guards; set engine.compile=blocks"
            )
        if cfg.zero == 3:
            # ZeRO 3 gathers a parameter that a module reads from its child in a hook of the module that read it first;
            # compiled code omits the hook, and in a forward for features alone another module reads it.
            for parameter in getattr(model, "external_parameters", list)():
                deepspeed.zero.register_external_parameter(model, parameter)
        self.device = world.device
        self._cfg = cfg
        self._zero_stage = cfg.zero
        self._world = world
        self._linear_casts = make_linear_casts(model, cfg) if cfg.zero < 3 else nullcontext  # 3 shards the weights
        self._guarded_optimizer = build_optimizer(param_groups, optim) if cfg.zero == 0 else None
        optimizer = self._guarded_optimizer or build_unguarded_optimizer(param_groups, optim)
        numels = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        config = build_deepspeed_config(optim, cfg, world.size, microbatch_size, accumulation_steps, numels)
        self._engine, self._optimizer = self._initialize(model, optimizer, config)
        if cfg.zero in (1, 2):
            keep_weights_as_views(self._optimizer)
        self._guard: GuardedOptimizer | ZeroGuard | None = self._guarded_optimizer
        if is_decided_on_device(optim, cfg.zero, config["zero_optimization"]):
            self._guard = ZeroGuard(self._optimizer, optimizer, cfg.zero, optim.max_grad_norm, world)
        self.model: nn.Module = self._engine
        self._gathered = deepspeed.zero.GatheredParameters
        self._full_fp32 = deepspeed.utils.safe_get_full_fp32_param

    def _initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Return DeepSpeed's engine and its optimizer."""
        engine, wrapped, *_ = import_deepspeed().initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        return engine, wrapped

    def set_lr(self, lr: float) -> None:
        apply_lr(self._optimizer, lr)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        with self._linear_casts():
            yield

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        with eager_forwards(self._cfg), eval_with_rank0_buffers(self.model, self._world):
            yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> StepResult:
        self._engine.step()
        return self._step_result()

    def _step_result(self) -> StepResult:
        if self._guard is not None:
            return StepResult(self._guard.step_applied, self._guard.grad_norm)
        applied, grad_norm = self._engine.was_step_applied(), float(self._engine.get_global_grad_norm())
        return StepResult(
            torch.tensor(applied, device=self.device),
            torch.tensor(grad_norm, dtype=torch.float64, device=self.device),
        )

    def update_ema(self, ema_prefix: str, source_prefix: str, lerp_weight: float) -> None:
        weight = lerp_weight * self._step_result().applied
        if self._zero_stage == 3:
            update_ema_sharded(self._optimizer, pair_parameters(self._engine.module, ema_prefix, source_prefix), weight)
        else:
            update_ema_replicated(self._engine.module, ema_prefix, source_prefix, weight)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without DeepSpeed's wrapper; under ZeRO 1 to 3 its parameters are flat partitions."""
        return self._guarded_optimizer or cast(Any, self._optimizer).optimizer

    def state_chunks(self) -> list[TensorChunk]:
        module = self._engine.module
        if self._guarded_optimizer is not None:
            chunks = replicated_parameter_chunks(module, self._guarded_optimizer, self._world)
            return chunks + buffer_chunks(module, self._world)
        chunks = sharded_parameter_chunks(module, self._optimizer, self._zero_stage, self._world)
        return chunks + buffer_chunks(module, self._world)

    @property
    def num_updates(self) -> int:
        return get_num_updates(self._base_optimizer)

    def on_state_loaded(self, num_updates: int) -> None:
        set_num_updates(self._base_optimizer, num_updates)
        if self._zero_stage:
            copy_master_weights_to_model(self._optimizer, self._zero_stage)

    def gather_full_state_dict(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in self._engine.module.named_parameters():
            with self._gathered([parameter]):
                # The fp32 master if it exists: under bf16 the module's own copy is rounded.
                master = self._full_fp32(parameter) if self._zero_stage and parameter.requires_grad else None
                if self._world.rank == 0:  # a copy, because the gathered parameter is freed
                    value = parameter if master is None else master
                    weights[name] = value.detach().to("cpu", torch.float32, copy=True)
        if self._world.rank:
            return {}
        return weights | {
            name: to_fp32_cpu_tensor(value) for name, value in persistent_buffers(self._engine.module).items()
        }
