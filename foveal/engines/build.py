"""Which engine a config names: what it would refuse, and the engine itself."""

from typing import Any, cast

import torch
from torch import nn

from foveal.distributed.world import World
from foveal.engines.base import Engine, EngineConfig
from foveal.engines.plain import PlainEngine
from foveal.errors import ConfigError
from foveal.optim.optimizers import OptimConfig


def check_engine_config(
    cfg: EngineConfig, optim: OptimConfig, world_size: int, *, microbatch_size: int, accumulation_steps: int
) -> None:
    """Refuse, before a run begins, what its engine would refuse. Raises: ConfigError."""
    if cfg.kind == "plain" and world_size > 1:
        raise ConfigError(
            f"engine.kind=plain runs in one process, this run has {world_size}; use deepspeed or accelerate"
        )
    if cfg.sharding != "ddp" and cfg.kind != "accelerate":
        raise ConfigError(
            f"engine.sharding={cfg.sharding} is Accelerate's, and engine.kind is {cfg.kind}; remove one of them"
        )
    if optim.kind == "lars" and cfg.sharding == "fsdp2":
        raise ConfigError(
            "optim.kind=lars wants the norms of whole weights, which engine.sharding=fsdp2 cuts up; use ddp, or sgd or adamw"
        )
    if "deepspeed" in (cfg.kind, cfg.sharding):
        if optim.kind != "adamw":
            raise ConfigError(
                f"optim.kind={optim.kind} does not run on DeepSpeed, which takes adamw only; use engine.kind=accelerate with "
                f"engine.sharding=ddp{'' if optim.kind == 'lars' else ' or fsdp2'}"
            )
        from foveal.engines.deepspeed import build_deepspeed_config

        config = build_deepspeed_config(optim, cfg, world_size, microbatch_size, accumulation_steps)
        if cfg.deepspeed:
            from foveal.engines.deepspeed_keys import check_deepspeed_keys

            del config["train_batch_size"]  # DeepSpeed would compare it with the ranks that this process knows of
            check_deepspeed_keys(config, cfg.deepspeed)


def set_matmul_precision(cfg: EngineConfig) -> None:
    """How this process multiplies in float32."""
    torch.set_float32_matmul_precision(cfg.matmul)
    torch.backends.cudnn.allow_tf32 = cfg.matmul != "highest"  # convolutions have a switch of their own, on by default
    torch.backends.cudnn.deterministic = True  # or a backward of convolutions may add in another order each time


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
    """The engine that ``cfg.kind`` names, holding the model on the device.

    Its library is imported only here: DeepSpeed alone takes longer to import than torch.
    """
    set_matmul_precision(cfg)
    if cfg.recompute:
        cast(Any, model).set_grad_checkpointing(enable=True)
    if cfg.compile:
        model.compile()  # in place, so that no `_orig_mod.` prefix reaches a file
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
