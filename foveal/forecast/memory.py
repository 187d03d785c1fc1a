"""What an engine holds on each GPU besides the micro itself: weights, gradients, moments, and the library's buffers.

Weights are fp32 under bf16 too: what autocast copies lives in the micro. What DeepSpeed does was read in its sources
(0.19, runtime/zero/stage_1_and_2.py and stage3.py); benchmarks/memory.py compares it all with what was allocated.
"""

from dataclasses import dataclass
from typing import Any

from foveal.engines.base import EngineConfig
from foveal.forecast.trace import MemoryTrace, ParameterCounts
from foveal.optim.optimizers import OptimConfig

_FP32, _BF16 = 4, 2
# DeepSpeed's defaults, in numbers of elements.
_BUCKET_ELEMENTS = 5e8
_PERSISTENCE_THRESHOLD = 1e5  # ZeRO 3 partitions no parameter below this
_REUSE_ELEMENTS = 1e9  # ZeRO 3 keeps gathered what is needed again within so many
_PREFETCH_ELEMENTS = 5e7

# What is no tensor: assumed, not measured. CUDA's context, cuBLAS's workspaces, NCCL's channels; fragmentation.
CUDA_CONTEXT_BYTES = 1.5e9
FRAGMENTATION_FACTOR = 1.08


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank. ``peak`` is the most that lives at once, while it starts or trains; the rest are its shares."""

    weights: float
    moments: float
    gradients: float
    buffers: float
    micro: float
    peak: float

    @property
    def required_bytes(self) -> float:
        """What the GPU must have."""
        return self.peak * FRAGMENTATION_FACTOR + CUDA_CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class _EngineBytes:
    """What an engine holds: always, of finished gradients, and in buffers that appear with the first of them.

    grows: gradients stay whole, and a first micro begins without any; flattens: the most that a reduction copies, once so
    many bytes of gradients are done; start, update: what lives at once while the engine is built and while it updates.
    """

    weights: float
    moments: float
    gradients: float
    permanent_buffers: float = 0.0
    late_buffers: float = 0.0
    gradients_accumulate: bool = False
    flatten_bytes: float = 0.0
    init_bytes: float = 0.0
    update_bytes: float = 0.0

    def bytes_during_backward(self, gradient_bytes_done: int) -> float:
        """Bytes beside weights and moments while a micro has finished ``done`` bytes of gradients."""
        copy = self.flatten_bytes if self.flatten_bytes and gradient_bytes_done >= self.flatten_bytes else 0.0
        return (
            (gradient_bytes_done if self.gradients_accumulate else self.gradients)
            + self.permanent_buffers
            + (self.late_buffers if gradient_bytes_done else 0.0)
            + copy
        )


def estimate_memory(
    parameters: ParameterCounts,
    trace: MemoryTrace,
    cfg: EngineConfig,
    optim: OptimConfig,
    *,
    world_size: int,
    num_microbatches: int,
) -> MemoryEstimate:
    """The memory of a rank under its engine, when a step has so many micros."""
    share = _engine_bytes(parameters, cfg, optim, world_size, num_microbatches)
    state = parameters.frozen_bytes + share.weights + share.moments
    return MemoryEstimate(
        weights=parameters.frozen_bytes + share.weights,
        moments=share.moments,
        gradients=share.gradients,
        buffers=share.permanent_buffers + share.late_buffers,
        micro=max(trace.peak_by_gradient_bytes.values()),
        peak=max(
            parameters.frozen_bytes + share.init_bytes,
            state + trace.peak_bytes(share.bytes_during_backward),
            state + share.update_bytes,
        ),
    )


def deepspeed_zero_stage(cfg: EngineConfig) -> int:
    """DeepSpeed's stage where DeepSpeed partitions, else 0."""
    return cfg.zero if cfg.kind == "deepspeed" or (cfg.kind == "accelerate" and cfg.sharding == "deepspeed") else 0


def _engine_bytes(
    weights: ParameterCounts, cfg: EngineConfig, optim: OptimConfig, ranks: int, micros: int
) -> _EngineBytes:
    stage = deepspeed_zero_stage(cfg)
    if stage == 3:
        return _zero3_bytes(weights, cfg, ranks)
    if stage:
        return _zero12_bytes(weights, cfg, ranks, micros, stage)
    if cfg.kind == "accelerate" and cfg.sharding == "fsdp2":
        return _fsdp2_bytes(weights, optim, ranks)
    whole = weights.trainable * _FP32
    deepspeed = cfg.kind == "deepspeed"
    buckets = whole if ranks > 1 and not deepspeed else 0.0  # DDP reduces copies that it keeps
    flat = min(whole, _BUCKET_ELEMENTS * _FP32) if deepspeed else 0.0
    spare = 0.0 if optim.kind == "adamw" and optim.fused else whole  # what is not one kernel copies as it computes
    return _EngineBytes(
        whole,
        optim.moments_per_parameter * whole,
        whole,
        permanent_buffers=buckets,
        gradients_accumulate=micros == 1,
        init_bytes=whole,
        update_bytes=whole + buckets + max(flat, spare),
    )


def _zero12_bytes(weights: ParameterCounts, cfg: EngineConfig, ranks: int, micros: int, stage: int) -> _EngineBytes:
    """Flat weights, a partition of fp32 masters and moments; stage 2 also keeps a partition of the gradients only."""
    zero = _zero_options(cfg)
    whole = weights.trainable * _FP32
    part = whole / ranks
    size = zero.get("reduce_bucket_size", _BUCKET_ELEMENTS) * _FP32
    # One for every type that is communicated, all of fp32, and twice where the reduction overlaps the backward pass.
    buckets = size * (2 if cfg.precision == "bf16" else 1) * (2 if zero.get("overlap_comm") else 1)
    reduced = min(whole, size)
    if stage == 1:
        gradients, grows = whole, micros == 1
        always, late = (buckets, 0.0) if micros > 1 else (0.0, buckets)
    else:
        gradients, grows = (part if micros > 1 else 0.0), False
        always, late = 0.0, buckets
    return _EngineBytes(
        whole + part,
        2 * part,
        gradients,
        permanent_buffers=always,
        late_buffers=late,
        gradients_accumulate=grows,
        flatten_bytes=size if stage == 2 and whole > size else 0.0,
        init_bytes=2 * whole + part,
        update_bytes=gradients + buckets + reduced + part,
    )


def _zero3_bytes(weights: ParameterCounts, cfg: EngineConfig, ranks: int) -> _EngineBytes:
    """Partitions of weights, masters, moments and gradients; what is gathered for use, and small parameters for ever."""
    zero = _zero_options(cfg)
    part = weights.trainable * _FP32 / ranks
    threshold = _zero3_option(zero, "param_persistence_threshold", _PERSISTENCE_THRESHOLD)
    small = sum(size for size in weights.tensor_sizes if size <= threshold)
    # A weight is needed again in the backward pass after twice what lies behind it.
    reuse = min(
        _zero3_option(zero, "max_reuse_distance", _REUSE_ELEMENTS) / 2,
        _zero3_option(zero, "max_live_parameters", _REUSE_ELEMENTS),
    )
    large, ahead = weights.trainable - small, _zero3_option(zero, "prefetch_bucket_size", _PREFETCH_ELEMENTS)
    gathered = min(large, reuse + ahead) * _FP32
    # They arrive in one piece and are copied out of it: at the start of a forward, or all along where not all are kept.
    arriving = min(large, ahead) * _FP32
    bucket = zero.get("reduce_bucket_size", _BUCKET_ELEMENTS)
    buckets = bucket * (_FP32 + _BF16 if cfg.precision == "bf16" else _FP32)
    reduced = min(weights.trainable, bucket) * _FP32
    return _EngineBytes(
        2 * part + small * _FP32 + gathered,
        2 * part,
        part,
        permanent_buffers=buckets + (arriving if large > reuse else 0.0),
        flatten_bytes=bucket * _FP32 if weights.trainable > bucket else 0.0,
        init_bytes=weights.trainable * _FP32 + 3 * part + buckets,
        update_bytes=part + buckets + max(reduced - gathered, arriving),
    )


def _fsdp2_bytes(weights: ParameterCounts, optim: OptimConfig, ranks: int) -> _EngineBytes:
    """Shards of everything; whole are what lies outside of the blocks, and two blocks with their gradients."""
    part = weights.trainable * _FP32 / ranks
    outside = max(weights.trainable - sum(weights.block_sizes), 0)
    largest = max(weights.block_sizes, default=0)
    gathered = (2 * outside + 4 * largest) * _FP32
    start = weights.trainable * _FP32 + part
    return _EngineBytes(
        part,
        optim.moments_per_parameter * part,
        part,
        permanent_buffers=gathered,
        init_bytes=start,
        update_bytes=2 * part,
    )


def _zero_options(cfg: EngineConfig) -> dict[str, Any]:
    return dict(cfg.deepspeed.get("zero_optimization", {}))


def _zero3_option(zero: dict[str, Any], name: str, default: float) -> float:
    """A setting of ZeRO 3, which DeepSpeed also takes with a prefix."""
    return zero.get(name, zero.get(f"stage3_{name}", default))
