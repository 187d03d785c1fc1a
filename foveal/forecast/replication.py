"""Whether a plan shards state for nothing: where all of it fits on every GPU, replication sends and starts less."""

from dataclasses import dataclass

from foveal.engines.config import EngineConfig
from foveal.forecast.forecast import Forecast
from foveal.forecast.memory import deepspeed_zero_stage

_USABLE_FRACTION = 0.9  # of a GPU's memory: estimates were off by up to 9 % (benchmarks/results/memory-gpu.md)


@dataclass(frozen=True, slots=True)
class Replication:
    """An engine without sharding, and the bytes that a GPU needs and sends per step with it and with the config's."""

    settings: str
    required_bytes: float
    sent_bytes: float
    configured_sent_bytes: float


def find_replication(forecast: Forecast) -> Replication | None:
    """Return the engine that replicates all state, if the configured one shards it and need not.

    None if the GPUs' memory is unknown or leaves no room, or if ranks would not send less. DDP stands for replication,
    because DeepSpeed's ZeRO 0, which sends as much, does so after the backward pass; a single rank needs neither.
    """
    plan, limit = forecast.plan, forecast.cluster.gpu_memory_bytes
    engine = plan.cfg.engine
    if limit is None or not _shards(engine):
        return None
    replicated = engine.model_copy(
        update={"kind": "plain"} if plan.world_size == 1 else {"kind": "accelerate", "sharding": "ddp"}
    )
    required_bytes = forecast.estimate_memory_with(replicated).required_bytes
    sent, configured_sent = (forecast.gpu_network_bytes_per_step(cfg) for cfg in (replicated, engine))
    sends_less = sent < configured_sent or plan.world_size == 1
    if required_bytes > _USABLE_FRACTION * limit or not sends_less:
        return None
    changes = {name: getattr(replicated, name) for name in ("kind", "sharding")}
    settings = " ".join(f"engine.{name}={value}" for name, value in changes.items() if value != getattr(engine, name))
    return Replication(settings, required_bytes, sent, configured_sent)


def _shards(cfg: EngineConfig) -> bool:
    return deepspeed_zero_stage(cfg) > 0 or (cfg.kind == "accelerate" and cfg.sharding == "fsdp2")
