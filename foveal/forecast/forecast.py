"""Memory, FLOPs, time and network traffic of a plan on a cluster."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from foveal.engines.config import EngineConfig, Precision
from foveal.forecast.host_memory import LoaderMemory, estimate_loader_memory, estimate_pinned_bytes
from foveal.forecast.memory import MemoryEstimate, deepspeed_zero_stage, estimate_memory, sums_in_bf16
from foveal.forecast.stated_data import StatedData
from foveal.forecast.trace import (
    MemoryTrace,
    ParameterCounts,
    SampleFlops,
    count_parameters,
    count_sample_flops,
    trace_microbatch_memory,
)
from foveal.optim.optimizers import OPTIMIZERS
from foveal.training.config import StageConfig
from foveal.training.plan import Plan
from foveal.training.stage import Stage

_FP32, _BF16 = 4, 2
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The GPUs of a plan: number, peak FLOP/s and memory of a GPU, and model FLOPs utilisation (``mfu``).

    ``hoped_mfu``: the other end of its range, None if it is stated; ``mfu_notes``: sentences about both numbers.
    ``write_bytes_per_second`` is the bandwidth of all ranks to the run directory's disk.
    """

    nodes: int
    gpus_per_node: int
    mfu: float
    write_bytes_per_second: float
    gpu_flops_per_second: float | None = None
    gpu_memory_bytes: float | None = None
    hoped_mfu: float | None = None
    mfu_notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Forecast:
    """A stage's plan on a cluster; ``stated_data``: of data that were not read."""

    stage: Stage[Any, Any]
    plan: Plan
    cluster: ClusterSpec
    stated_data: StatedData | None = None

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        return count_parameters(self._build, self.plan.cfg.optim)

    @cached_property
    def flops_per_sample(self) -> SampleFlops:
        data = self.plan.cfg.data
        return count_sample_flops(self._build, data.channels, data.image_hw, self._example_targets)

    @cached_property
    def memory_estimate(self) -> MemoryEstimate:
        return self.estimate_memory_with(self.plan.cfg.engine)

    def estimate_memory_with(self, engine_cfg: EngineConfig, microbatch_size: int | None = None) -> MemoryEstimate:
        """Return the memory of a rank under another engine, or with another microbatch size."""
        plan = self.plan
        size = microbatch_size or plan.microbatch_size
        trace = self._trace(engine_cfg.precision, size, recompute=engine_cfg.activation_checkpointing)
        return estimate_memory(
            self.parameter_counts,
            trace,
            engine_cfg,
            plan.cfg.optim,
            world_size=plan.world_size,
            accumulation_steps=plan.microbatch_size * plan.accumulation_steps // size,
        )

    @cached_property
    def memory_by_sharding(self) -> dict[str, dict[str, MemoryEstimate]]:
        """Memory of a rank by sharding of the state, then by precision and recomputation."""
        cfg = self.plan.cfg.engine
        variants = {
            f"{precision}{', recompute' if recompute else ''}": {
                "precision": precision,
                "activation_checkpointing": recompute,
            }
            for precision in _PRECISIONS
            for recompute in ((False, True) if self.parameter_counts.can_recompute else (False,))
        }
        return {
            sharding: {
                variant: self.estimate_memory_with(cfg.model_copy(update=sharding_update | variant_update))
                for variant, variant_update in variants.items()
            }
            for sharding, sharding_update in engine_overrides_by_sharding(self.plan.cfg).items()
        }

    @property
    def selected_sharding(self) -> str:
        """The row of ``memory_by_sharding`` that the config selects."""
        cfg = self.plan.cfg.engine
        return next(
            name
            for name, update in engine_overrides_by_sharding(self.plan.cfg).items()
            if cfg.model_copy(update=update) == cfg
        )

    @property
    def selected_variant(self) -> str:
        """The column of ``memory_by_sharding`` that the config selects."""
        cfg = self.plan.cfg.engine
        return f"{cfg.precision}{', recompute' if cfg.activation_checkpointing else ''}"

    @property
    def global_flops_per_step(self) -> float:
        """Floating-point operations of a step, all ranks."""
        return self.flops_per_sample.forward_backward * self.plan.cfg.batch.global_size

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step at ``mfu`` of the GPUs' peak; None if the peak is unknown."""
        rate = self.cluster.gpu_flops_per_second
        return (
            None if rate is None else self.global_flops_per_step / (self.cluster.world_size * rate * self.cluster.mfu)
        )

    @property
    def all_runs_training_seconds(self) -> float | None:
        """Seconds from the first step to the last, of all runs of the plan; None if the GPUs' peak is unknown."""
        step = self.step_seconds
        return None if step is None else step * self.plan.total_steps * self.plan.num_runs

    @property
    def hoped_speedup(self) -> float | None:
        """How much faster training is at the hoped utilisation; None without a range."""
        hoped = self.cluster.hoped_mfu
        return None if hoped is None else hoped / self.cluster.mfu

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and moments of trained parameters, and frozen tensors of the model's state."""
        return self.parameter_counts.checkpoint_bytes

    @property
    def pinned_checkpoint_bytes(self) -> int:
        """Host memory that the ranks of a node pin for the copy of a checkpoint, where they have GPUs."""
        cfg, cluster = self.plan.cfg, self.cluster
        return estimate_pinned_bytes(
            self.parameter_counts, cfg.engine, cfg.optim, nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node
        )

    @property
    def loader_memory(self) -> LoaderMemory | None:
        """Memory of a node's loaders; None if ranks read the data themselves."""
        return estimate_loader_memory(self.plan, self.cluster.gpus_per_node)

    @property
    def seconds_per_save(self) -> float:
        """Seconds to write a checkpoint, all ranks in parallel."""
        return self.checkpoint_bytes / self.cluster.write_bytes_per_second

    @property
    def mean_stored_sample_bytes(self) -> float | None:
        """Mean size of a sample of the first data set, in bytes; None if nobody knows."""
        if self.stated_data is not None and self.stated_data.bytes_per_image is None:
            return None
        source = self.plan.training_set.sources[0]
        shards = source.dataset.manifest.splits[source.split].shards
        return sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))

    @property
    def images_per_second_per_rank(self) -> float | None:
        """Images that a rank must decode per second to keep up with training; None if the GPUs' peak is unknown."""
        step = self.step_seconds
        return None if step is None else self.plan.cfg.batch.global_size / self.plan.world_size / step

    def gpu_network_bytes_per_step(self, engine_cfg: EngineConfig) -> float:
        """Return the bytes that a rank sends in a step, with ring collectives."""
        ranks, microbatches = self.plan.world_size, self.plan.accumulation_steps
        ring = (ranks - 1) / ranks
        fp32_bytes = self.parameter_counts.trainable * _FP32
        autocast_bytes = fp32_bytes - (
            self.parameter_counts.linear_trainable * (_FP32 - _BF16) if sums_in_bf16(engine_cfg) else 0
        )
        stage = deepspeed_zero_stage(engine_cfg)
        if stage == 3:
            return ring * microbatches * (autocast_bytes + autocast_bytes)  # per microbatch: weights, gradients
        if stage == 2:
            return ring * (microbatches * 2 * autocast_bytes + fp32_bytes)  # all-reduce per microbatch, weights once
        if stage == 1:
            return ring * (2 * autocast_bytes + fp32_bytes)
        if engine_cfg.kind == "accelerate" and engine_cfg.sharding == "fsdp2":
            return ring * microbatches * 3 * fp32_bytes  # weights in forward and in backward, gradients
        return ring * 2 * fp32_bytes

    @cached_property
    def network_bytes_by_sharding(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by sharding of the state."""
        cfg = self.plan.cfg.engine
        return {
            name: self.gpu_network_bytes_per_step(cfg.model_copy(update=update))
            for name, update in engine_overrides_by_sharding(self.plan.cfg).items()
        }

    @property
    def _example_targets(self) -> Tensor | None:
        """Targets of one sample; None if the index has the labels."""
        reader, image_hw = self.plan.label_reader, self.plan.cfg.data.image_hw
        return None if reader is None else reader.collate([reader.example_label(image_hw)], image_hw)

    def _build(self, device: Any) -> Any:
        return self.stage.functions.build(self.plan, device)

    def _trace(self, precision: Precision, batch_size: int, *, recompute: bool) -> MemoryTrace:
        trace = self._traces.get((precision, batch_size, recompute))
        if trace is None:
            data = self.plan.cfg.data
            trace = trace_microbatch_memory(
                self._build,
                batch_size,
                data.channels,
                data.image_hw,
                self._example_targets,
                precision=precision,
                recompute=recompute,
            )
            self._traces[precision, batch_size, recompute] = trace
        return trace

    @cached_property
    def _traces(self) -> dict[tuple[Precision, int, bool], MemoryTrace]:
        return {}


def engine_overrides_by_sharding(stage_cfg: StageConfig) -> dict[str, dict[str, Any]]:
    """Return the engine settings of every sharding that the configured engine supports, by display name."""
    cfg = stage_cfg.engine
    if cfg.kind == "plain":
        return {"plain": {}}
    if cfg.kind == "deepspeed" or cfg.sharding == "deepspeed":
        return {f"ZeRO {stage}": {"zero": stage} for stage in (0, 1, 2, 3)}
    ddp = {"DDP": {"sharding": "ddp"}}
    return ddp if "fsdp2" in OPTIMIZERS[stage_cfg.optim.name].unsupported else ddp | {"FSDP2": {"sharding": "fsdp2"}}
