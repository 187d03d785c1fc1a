"""Check the engine settings and build the engine."""

from typing import Any, cast

import torch
from torch import nn

from foveal.distributed.world import World
from foveal.engines.attention import apply_attention
from foveal.engines.base import Engine
from foveal.engines.compiling import compile_model
from foveal.engines.config import EngineConfig
from foveal.engines.plain import PlainEngine
from foveal.errors import ConfigError
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import OPTIMIZERS


def check_engine_config(
    cfg: EngineConfig, optim: OptimConfig, world_size: int, *, microbatch_size: int, accumulation_steps: int
) -> None:
    """Check the settings of engine and optimizer before a run begins. Raises: ConfigError."""
    if cfg.kind == "plain" and world_size > 1:
        raise ConfigError(
            f"engine.kind=plain runs in one process, this run has {world_size}; use deepspeed or accelerate"
        )
    _check_optimizer_runs(cfg, optim)
    if cfg.uses_deepspeed:
        from foveal.engines.deepspeed import build_deepspeed_config

        config = build_deepspeed_config(optim, cfg, world_size, microbatch_size, accumulation_steps)
        if cfg.deepspeed:
            from foveal.engines.deepspeed_keys import check_deepspeed_settings

            del config["train_batch_size"]  # DeepSpeed would compare it with this process's number of ranks
            check_deepspeed_settings(config, cfg.deepspeed)


def _check_optimizer_runs(cfg: EngineConfig, optim: OptimConfig) -> None:
    """Refuse an optimizer that the engine cannot run, by the table of optimizers. Raises: ConfigError."""
    unsupported = OPTIMIZERS[optim.name].unsupported
    if cfg.uses_deepspeed and "deepspeed" in unsupported:
        raise ConfigError(
            f"optim.name={optim.name} {unsupported['deepspeed']}; use engine.kind=plain for one process, or "
            f"engine.kind=accelerate with engine.sharding=ddp{'' if 'fsdp2' in unsupported else ' or fsdp2'}"
        )
    if cfg.sharding == "fsdp2" and "fsdp2" in unsupported:
        others = [name for name, spec in OPTIMIZERS.items() if "fsdp2" not in spec.unsupported]
        raise ConfigError(
            f"optim.name={optim.name} {unsupported['fsdp2']}; use engine.sharding=ddp, or optim.name="
            f"{' or '.join(others)}"
        )


def set_matmul_and_determinism(cfg: EngineConfig) -> None:
    """Set this process's float32 precision of products, and deterministic convolutions."""
    torch.set_float32_matmul_precision(cfg.float32_matmul_precision)
    torch.backends.cudnn.allow_tf32 = (
        cfg.float32_matmul_precision != "highest"
    )  # a separate switch for convolutions, on by default
    torch.backends.cudnn.deterministic = True  # else a convolution's backward may add in a varying order


def build_engine(
    model: nn.Module,
    param_groups: list[dict[str, Any]],
    optim: OptimConfig,
    cfg: EngineConfig,
    world: World,
    *,
    microbatch_size: int,
    accumulation_steps: int,
) -> Engine:
    """Build the engine of ``cfg.kind``, with the model on the device.

    The engine's library is imported only here: DeepSpeed takes longer to import than torch.
    """
    set_matmul_and_determinism(cfg)
    if cfg.activation_checkpointing:
        cast(Any, model).set_grad_checkpointing(enable=True)
    apply_attention(model, cfg)
    compile_model(model, cfg)
    if cfg.kind == "deepspeed":
        from foveal.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, param_groups, optim, cfg, world, microbatch_size, accumulation_steps)
    if cfg.kind == "accelerate":
        from foveal.engines.accelerate import AccelerateDDPEngine, AccelerateDeepSpeedEngine, AccelerateFSDP2Engine

        if cfg.sharding == "deepspeed":
            return AccelerateDeepSpeedEngine(
                model, param_groups, optim, cfg, world, microbatch_size, accumulation_steps
            )
        engine = AccelerateFSDP2Engine if cfg.sharding == "fsdp2" else AccelerateDDPEngine
        return engine(model, param_groups, optim, cfg, world, accumulation_steps)
    return PlainEngine(model, param_groups, optim, cfg, world, accumulation_steps)
