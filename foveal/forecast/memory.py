"""Memory of a rank besides the microbatch: weights, gradients, moments, and the engine's buffers.

Weights are fp32 under bf16 too: autocast's copies count as the microbatch. DeepSpeed's behaviour is from its sources
(0.19, runtime/zero/stage_1_and_2.py and stage3.py); benchmarks/memory.py compares the estimates with measurements.
"""

from dataclasses import dataclass
from typing import Any

from foveal.engines.buckets import derive_zero_options
from foveal.engines.config import EngineConfig
from foveal.forecast.trace import MemoryTrace, ParameterCounts
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import count_moment_elements, count_temporary_elements

_FP32, _BF16 = 4, 2
# DeepSpeed's defaults, in elements.
_BUCKET_ELEMENTS = 5e8  # under ZeRO 0; otherwise foveal.engines.buckets decides
_PERSISTENCE_THRESHOLD = 1e5  # ZeRO 3 does not partition smaller parameters
_REUSE_ELEMENTS = 1e9  # ZeRO 3 keeps weights gathered that are reused within this distance
_PREFETCH_ELEMENTS = 5e7

# Memory outside tensors, assumed, not measured: CUDA context, cuBLAS workspaces, NCCL channels; fragmentation.
CUDA_CONTEXT_BYTES = 1.5e9
FRAGMENTATION_FACTOR = 1.08


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank. ``peak`` is the maximum at any time, start-up included; the other fields are parts of it."""

    weights: float
    moments: float
    gradients: float
    buffers: float
    micro: float
    peak: float

    @property
    def required_bytes(self) -> float:
        """GPU memory needed, with fragmentation and the CUDA context."""
        return self.peak * FRAGMENTATION_FACTOR + CUDA_CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class _EngineBytes:
    """Bytes that an engine holds: state, gradients, and buffers (``late_buffers`` from the first gradient on).

    ``gradients_accumulate``: gradients are unsharded and appear one by one in the only microbatch. ``flatten_bytes``:
    a reduction's copy, made once so many bytes of gradients are done. ``init_bytes``: everything held while the engine
    is built; ``update_bytes``: the extra while it updates.
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
        """Return bytes beside weights and moments once a microbatch has finished so many bytes of gradients."""
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
    accumulation_steps: int,
) -> MemoryEstimate:
    """Return the memory of a rank under an engine, for a number of microbatches per step."""
    engine = _engine_bytes(parameters, cfg, optim, world_size, accumulation_steps)
    state = parameters.frozen_bytes + engine.weights + engine.moments
    return MemoryEstimate(
        weights=parameters.frozen_bytes + engine.weights,
        moments=engine.moments,
        gradients=engine.gradients,
        buffers=engine.permanent_buffers + engine.late_buffers,
        micro=max(trace.peak_by_gradient_bytes.values()),
        peak=max(
            parameters.frozen_bytes + engine.init_bytes,
            state + trace.peak_bytes_with_engine(engine.bytes_during_backward),
            state + engine.update_bytes,
        ),
    )


def deepspeed_zero_stage(cfg: EngineConfig) -> int:
    """Return DeepSpeed's ZeRO stage, 0 for other engines."""
    return cfg.zero if cfg.kind == "deepspeed" or (cfg.kind == "accelerate" and cfg.sharding == "deepspeed") else 0


def _engine_bytes(
    parameters: ParameterCounts, cfg: EngineConfig, optim: OptimConfig, ranks: int, microbatches: int
) -> _EngineBytes:
    stage = deepspeed_zero_stage(cfg)
    moments = _FP32 * count_moment_elements(optim, parameters.trainable, parameters.hidden_matrices)
    if stage == 3:
        return _zero3_bytes(parameters, cfg, moments, ranks)
    if stage:
        return _zero12_bytes(parameters, cfg, moments, ranks, microbatches, stage)
    if cfg.kind == "accelerate" and cfg.sharding == "fsdp2":
        return _fsdp2_bytes(parameters, moments, ranks)
    weights = parameters.trainable * _FP32
    deepspeed = cfg.kind == "deepspeed"
    buckets = weights if ranks > 1 and not deepspeed else 0.0  # DDP keeps copies of the gradients
    flat = min(weights, _BUCKET_ELEMENTS * _FP32) if deepspeed else 0.0
    temporary = _FP32 * count_temporary_elements(optim, parameters.trainable, parameters.hidden_matrices)
    return _EngineBytes(
        weights,
        moments,
        weights,
        permanent_buffers=buckets,
        gradients_accumulate=microbatches == 1,
        init_bytes=weights,
        update_bytes=weights + buckets + max(flat, temporary),
    )


def _zero12_bytes(
    parameters: ParameterCounts, cfg: EngineConfig, moments: float, ranks: int, microbatches: int, stage: int
) -> _EngineBytes:
    """Flat weights, and partitions of fp32 master weights and moments; in stage 2 also of gradients."""
    zero = _zero_options(cfg, parameters, ranks)
    weights = parameters.trainable * _FP32
    partition = weights / ranks
    bucket, overlaps = zero["reduce_bucket_size"] * _FP32, bool(zero.get("overlap_comm"))
    # One bucket per communicated dtype, all in fp32, and two if the reduction overlaps the backward pass.
    buckets = bucket * (2 if sums_in_bf16(cfg) else 1) * (2 if overlaps else 1)
    reduced = min(weights, bucket)
    accumulates = microbatches > 1
    if stage == 1 and not zero.get("contiguous_gradients", True):
        # Gradients stay where they are: a reduction copies a bucket of them, and then the update a group's partition.
        return _EngineBytes(
            weights + partition,
            moments / ranks,
            weights,
            gradients_accumulate=not accumulates,
            init_bytes=2 * weights + partition,
            update_bytes=weights + max(reduced, partition),
        )
    # ZeRO 2 and an overlapping reduction move a gradient into a bucket, and then into the partition, once it is done.
    moves_gradients = stage == 2 or overlaps
    gradients = partition if stage == 2 else weights
    if moves_gradients and not accumulates:
        gradients = 0.0
    keeps_buckets = stage == 1 and accumulates
    return _EngineBytes(
        weights + partition,
        moments / ranks,
        gradients,
        permanent_buffers=buckets if keeps_buckets else 0.0,
        late_buffers=0.0 if keeps_buckets else buckets,
        gradients_accumulate=not moves_gradients and not accumulates,
        # ZeRO 1 accumulates whole gradients, whose memory the reduction of the last microbatch releases bit by bit.
        flatten_bytes=bucket if moves_gradients and not keeps_buckets and weights > bucket else 0.0,
        init_bytes=2 * weights + partition,
        update_bytes=(0.0 if stage == 1 and overlaps else gradients) + buckets + reduced + partition,
    )


def _zero3_bytes(parameters: ParameterCounts, cfg: EngineConfig, moments: float, ranks: int) -> _EngineBytes:
    """Partitions of weights, master weights, moments and gradients; gathered weights, and unpartitioned small ones."""
    zero = _zero_options(cfg, parameters, ranks)
    partition = parameters.trainable * _FP32 / ranks
    threshold = _zero3_option(zero, "param_persistence_threshold", _PERSISTENCE_THRESHOLD)
    small = sum(size for size in parameters.trainable_tensor_numels if size <= threshold)
    # The reuse distance of a weight, from forward to backward, is twice the number of elements behind it.
    reuse = min(
        _zero3_option(zero, "max_reuse_distance", _REUSE_ELEMENTS) / 2,
        _zero3_option(zero, "max_live_parameters", _REUSE_ELEMENTS),
    )
    large, prefetch = parameters.trainable - small, _zero3_option(zero, "prefetch_bucket_size", _PREFETCH_ELEMENTS)
    gathered = min(large, reuse + prefetch) * _FP32
    # An all-gather's flat output, copied into weights: at the start of a forward, or throughout if not all are kept.
    gather_buffer = min(large, prefetch) * _FP32
    bucket = zero["reduce_bucket_size"]
    buckets = bucket * (_FP32 + _BF16 if sums_in_bf16(cfg) else _FP32)
    reduced = min(parameters.trainable, bucket) * _FP32
    return _EngineBytes(
        2 * partition + small * _FP32 + gathered,
        moments / ranks,
        partition,
        permanent_buffers=buckets + (gather_buffer if large > reuse else 0.0),
        flatten_bytes=bucket * _FP32 if parameters.trainable > bucket else 0.0,
        init_bytes=parameters.trainable * _FP32 + 3 * partition + buckets,
        update_bytes=partition + buckets + max(reduced - gathered, gather_buffer),
    )


def _fsdp2_bytes(parameters: ParameterCounts, moments: float, ranks: int) -> _EngineBytes:
    """Shards of everything; gathered are weights and gradients of the root and of two blocks."""
    shard = parameters.trainable * _FP32 / ranks
    root = max(parameters.trainable - sum(parameters.block_numels), 0)
    largest_block = max(parameters.block_numels, default=0)
    return _EngineBytes(
        shard,
        moments / ranks,
        shard,
        permanent_buffers=(2 * root + 4 * largest_block) * _FP32,
        init_bytes=parameters.trainable * _FP32 + shard,
        update_bytes=2 * shard,
    )


def sums_in_bf16(cfg: EngineConfig) -> bool:
    """Whether ZeRO 1 to 3 sum gradients of linear and convolution layers, and gather their weights, in bf16."""
    return cfg.precision == "bf16" and cfg.reduce_dtype == "autocast"


def _zero_options(cfg: EngineConfig, parameters: ParameterCounts, ranks: int) -> dict[str, Any]:
    user_options = cfg.deepspeed.get("zero_optimization", {})
    return derive_zero_options(deepspeed_zero_stage(cfg), parameters.trainable_tensor_numels, ranks, user_options)


def _zero3_option(zero: dict[str, Any], name: str, default: float) -> float:
    """Return an option of ZeRO 3, which DeepSpeed accepts with and without the prefix stage3_."""
    return zero.get(name, zero.get(f"stage3_{name}", default))
