"""What an engine holds on each GPU besides the micro itself: weights, gradients, moments, and the library's buffers.

Weights are fp32 under bf16 too: what autocast copies lives in the micro. What DeepSpeed does was read in its sources
(0.19, runtime/zero/stage_1_and_2.py and stage3.py); benchmarks/memory.py compares it all with what was allocated.
"""

from dataclasses import dataclass
from typing import Any

from foveal.engines.base import EngineConfig
from foveal.forecast.trace import Trace, Weights
from foveal.optim.optimizers import OptimConfig

_FP32, _BF16 = 4, 2
# DeepSpeed's defaults, in numbers of elements.
_BUCKET = 5e8
_PERSISTENT = 1e5  # ZeRO 3 partitions no parameter below this
_REUSE = 1e9  # ZeRO 3 keeps gathered what is needed again within so many
_PREFETCH = 5e7

# What is no tensor: assumed, not measured. CUDA's context, cuBLAS's workspaces, NCCL's channels; fragmentation.
CONTEXT_BYTES = 1.5e9
FRAGMENTED = 1.08


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank. ``peak`` is the most that lives at once, while it starts or trains; the rest are its shares."""

    weights: float
    moments: float
    gradients: float
    buffers: float
    micro: float
    peak: float

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return self.peak * FRAGMENTED + CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class _Share:
    """What an engine holds: always, of finished gradients, and in buffers that appear with the first of them.

    grows: gradients stay whole, and a first micro begins without any; flattens: the most that a reduction copies, once so
    many bytes of gradients are done; start, update: what lives at once while the engine is built and while it updates.
    """

    weights: float
    moments: float
    gradients: float
    always: float = 0.0
    late: float = 0.0
    grows: bool = False
    flattens: float = 0.0
    start: float = 0.0
    update: float = 0.0

    def kept(self, done: int) -> float:
        """Bytes beside weights and moments while a micro has finished ``done`` bytes of gradients."""
        copy = self.flattens if self.flattens and done >= self.flattens else 0.0
        return (done if self.grows else self.gradients) + self.always + (self.late if done else 0.0) + copy


def memory_of(
    weights: Weights, trace: Trace, cfg: EngineConfig, optim: OptimConfig, *, ranks: int, micros: int
) -> Memory:
    """The memory of a rank under its engine, when a step has so many micros."""
    share = _share(weights, cfg, optim, ranks, micros)
    state = weights.frozen_bytes + share.weights + share.moments
    return Memory(
        weights=weights.frozen_bytes + share.weights,
        moments=share.moments,
        gradients=share.gradients,
        buffers=share.always + share.late,
        micro=max(trace.moments.values()),
        peak=max(weights.frozen_bytes + share.start, state + trace.peak(share.kept), state + share.update),
    )


def zero_stage(cfg: EngineConfig) -> int:
    """DeepSpeed's stage where DeepSpeed partitions, else 0."""
    return cfg.zero if cfg.kind == "deepspeed" or (cfg.kind == "accelerate" and cfg.sharding == "deepspeed") else 0


def _share(weights: Weights, cfg: EngineConfig, optim: OptimConfig, ranks: int, micros: int) -> _Share:
    stage = zero_stage(cfg)
    if stage == 3:
        return _zero_3(weights, cfg, ranks)
    if stage:
        return _zero_1_and_2(weights, cfg, ranks, micros, stage)
    if cfg.kind == "accelerate" and cfg.sharding == "fsdp2":
        return _fsdp2(weights, optim, ranks)
    whole = weights.trained * _FP32
    deepspeed = cfg.kind == "deepspeed"
    buckets = whole if ranks > 1 and not deepspeed else 0.0  # DDP reduces copies that it keeps
    flat = min(whole, _BUCKET * _FP32) if deepspeed else 0.0
    spare = 0.0 if optim.kind == "adamw" and optim.fused else whole  # what is not one kernel copies as it computes
    return _Share(
        whole,
        optim.moments * whole,
        whole,
        always=buckets,
        grows=micros == 1,
        start=whole,
        update=whole + buckets + max(flat, spare),
    )


def _zero_1_and_2(weights: Weights, cfg: EngineConfig, ranks: int, micros: int, stage: int) -> _Share:
    """Flat weights, a partition of fp32 masters and moments; stage 2 also keeps a partition of the gradients only."""
    zero = _settings(cfg)
    whole = weights.trained * _FP32
    part = whole / ranks
    size = zero.get("reduce_bucket_size", _BUCKET) * _FP32
    # One for every type that is communicated, all of fp32, and twice where the reduction overlaps the backward pass.
    buckets = size * (2 if cfg.precision == "bf16" else 1) * (2 if zero.get("overlap_comm") else 1)
    reduced = min(whole, size)
    if stage == 1:
        gradients, grows = whole, micros == 1
        always, late = (buckets, 0.0) if micros > 1 else (0.0, buckets)
    else:
        gradients, grows = (part if micros > 1 else 0.0), False
        always, late = 0.0, buckets
    return _Share(
        whole + part,
        2 * part,
        gradients,
        always=always,
        late=late,
        grows=grows,
        flattens=size if stage == 2 and whole > size else 0.0,
        start=2 * whole + part,
        update=gradients + buckets + reduced + part,
    )


def _zero_3(weights: Weights, cfg: EngineConfig, ranks: int) -> _Share:
    """Partitions of weights, masters, moments and gradients; what is gathered for use, and small parameters for ever."""
    zero = _settings(cfg)
    part = weights.trained * _FP32 / ranks
    threshold = _named(zero, "param_persistence_threshold", _PERSISTENT)
    small = sum(size for size in weights.sizes if size <= threshold)
    # A weight is needed again in the backward pass after twice what lies behind it.
    reuse = min(_named(zero, "max_reuse_distance", _REUSE) / 2, _named(zero, "max_live_parameters", _REUSE))
    large, ahead = weights.trained - small, _named(zero, "prefetch_bucket_size", _PREFETCH)
    gathered = min(large, reuse + ahead) * _FP32
    # They arrive in one piece and are copied out of it: at the start of a forward, or all along where not all are kept.
    arriving = min(large, ahead) * _FP32
    bucket = zero.get("reduce_bucket_size", _BUCKET)
    buckets = bucket * (_FP32 + _BF16 if cfg.precision == "bf16" else _FP32)
    reduced = min(weights.trained, bucket) * _FP32
    return _Share(
        2 * part + small * _FP32 + gathered,
        2 * part,
        part,
        always=buckets + (arriving if large > reuse else 0.0),
        flattens=bucket * _FP32 if weights.trained > bucket else 0.0,
        start=weights.trained * _FP32 + 3 * part + buckets,
        update=part + buckets + max(reduced - gathered, arriving),
    )


def _fsdp2(weights: Weights, optim: OptimConfig, ranks: int) -> _Share:
    """Shards of everything; whole are what lies outside of the blocks, and two blocks with their gradients."""
    part = weights.trained * _FP32 / ranks
    outside = max(weights.trained - sum(weights.blocks), 0)
    largest = max(weights.blocks, default=0)
    gathered = (2 * outside + 4 * largest) * _FP32
    start = weights.trained * _FP32 + part
    return _Share(part, optim.moments * part, part, always=gathered, start=start, update=2 * part)


def _settings(cfg: EngineConfig) -> dict[str, Any]:
    return dict(cfg.deepspeed.get("zero_optimization", {}))


def _named(zero: dict[str, Any], name: str, default: float) -> float:
    """A setting of ZeRO 3, which DeepSpeed also takes with a prefix."""
    return zero.get(name, zero.get(f"stage3_{name}", default))
