"""What a plan comes to on a cluster: memory, work, time and traffic, as numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foveal.engines.base import EngineConfig, Precision
from foveal.forecast.memory import MemoryEstimate, deepspeed_zero_stage, estimate_memory
from foveal.forecast.trace import MemoryTrace, ParameterCounts, SampleFlops, count_flops, count_parameters, trace_memory
from foveal.training.cli import Stage
from foveal.training.plan import Plan, StageConfig

_FP32, _BF16 = 4, 2
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The GPUs that a plan is made for: operations a second at best, the share of them that is reached, bytes.

    write_bytes: what all ranks together write a second to the run directory's disk.
    """

    nodes: int
    gpus_per_node: int
    mfu: float
    write_bytes_per_second: float
    peak_flops_per_second: float | None = None
    gpu_memory_bytes: float | None = None

    @property
    def world_size(self) -> int:
        """One for every GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Forecast:
    """A stage's plan on a machine."""

    stage: Stage[Any, Any]
    plan: Plan
    cluster: ClusterSpec

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        return count_parameters(self._build)

    @cached_property
    def flops_per_sample(self) -> SampleFlops:
        data = self.plan.cfg.data
        return count_flops(self._build, data.channels, data.image_hw, data.labels, self._num_classes)

    @cached_property
    def memory_estimate(self) -> MemoryEstimate:
        return self.estimate_memory_with(self.plan.cfg.engine)

    def estimate_memory_with(self, engine_cfg: EngineConfig, microbatch_size: int | None = None) -> MemoryEstimate:
        """The memory of a rank under another engine, or with fewer images at once."""
        plan = self.plan
        samples = microbatch_size or plan.microbatch_size
        micros = plan.microbatch_size * plan.accumulation_steps // samples
        trace = self._trace(engine_cfg.precision, samples, recompute=engine_cfg.recompute)
        return estimate_memory(
            self.parameter_counts,
            trace,
            engine_cfg,
            plan.cfg.optim,
            world_size=plan.world_size,
            num_microbatches=micros,
        )

    @cached_property
    def memory_by_sharding(self) -> dict[str, dict[str, MemoryEstimate]]:
        """The memory of a rank by how the state is shared, then by precision and recomputation."""
        cfg = self.plan.cfg.engine
        ways = {
            f"{precision}{', recompute' if recompute else ''}": {"precision": precision, "recompute": recompute}
            for precision in _PRECISIONS
            for recompute in ((False, True) if self.parameter_counts.can_recompute else (False,))
        }
        return {
            name: {way: self.estimate_memory_with(cfg.model_copy(update=change | how)) for way, how in ways.items()}
            for name, change in sharding_options(self.plan.cfg).items()
        }

    @property
    def selected_sharding(self) -> str:
        """The row of ``choices`` that the config asks for."""
        cfg = self.plan.cfg.engine
        return next(
            name for name, change in sharding_options(self.plan.cfg).items() if cfg.model_copy(update=change) == cfg
        )

    @property
    def selected_variant(self) -> str:
        """The column of ``choices`` that the config asks for."""
        cfg = self.plan.cfg.engine
        return f"{cfg.precision}{', recompute' if cfg.recompute else ''}"

    @property
    def flops_per_step(self) -> float:
        """Of all ranks together."""
        return self.flops_per_sample.forward_backward * self.plan.cfg.batch.images

    @property
    def step_seconds(self) -> float | None:
        """At the stated share of the GPUs' rate; nothing where that is not known."""
        rate = self.cluster.peak_flops_per_second
        return None if rate is None else self.flops_per_step / (self.cluster.world_size * rate * self.cluster.mfu)

    @property
    def total_seconds(self) -> float | None:
        """From the first step to the last, of every run that it comes to."""
        step = self.step_seconds
        return None if step is None else step * self.plan.total_steps * self.plan.num_runs

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and moments of what is trained, and what else the model keeps."""
        return (
            1 + self.plan.cfg.optim.moments_per_parameter
        ) * _FP32 * self.parameter_counts.trainable + self.parameter_counts.frozen_checkpoint_bytes

    @property
    def save_seconds(self) -> float:
        """To write one checkpoint, by all ranks together."""
        return self.checkpoint_bytes / self.cluster.write_bytes_per_second

    @property
    def mean_image_bytes(self) -> float:
        """The mean of the first set's samples."""
        source = self.plan.training_set.sources[0]
        shards = source.dataset.manifest.splits[source.split].shards
        return sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))

    @property
    def images_per_second_per_rank(self) -> float | None:
        """That a rank must decode, so that it never waits."""
        step = self.step_seconds
        return None if step is None else self.plan.cfg.batch.images / self.plan.world_size / step

    def network_bytes_per_step(self, engine_cfg: EngineConfig) -> float:
        """Bytes that a rank sends in a step, where collectives go round a ring."""
        ranks, micros = self.plan.world_size, self.plan.accumulation_steps
        share = (ranks - 1) / ranks
        whole = self.parameter_counts.trainable * _FP32
        # DeepSpeed communicates gradients of linear layers in autocast's type.
        lowered = whole - (
            self.parameter_counts.linear_trainable * (_FP32 - _BF16) if engine_cfg.precision == "bf16" else 0
        )
        stage = deepspeed_zero_stage(engine_cfg)
        if stage == 3:
            return share * micros * (lowered + lowered)  # weights once a micro, gradients once
        if stage == 2:
            return share * (micros * 2 * lowered + whole)  # all-reduce in every micro, updated weights once
        if stage == 1:
            return share * (2 * lowered + whole)
        if engine_cfg.kind == "accelerate" and engine_cfg.sharding == "fsdp2":
            return share * micros * 3 * whole  # weights forward and backward, gradients
        return share * 2 * whole

    @cached_property
    def network_bytes_by_sharding(self) -> dict[str, float]:
        """By how the state is shared."""
        cfg = self.plan.cfg.engine
        return {
            name: self.network_bytes_per_step(cfg.model_copy(update=change))
            for name, change in sharding_options(self.plan.cfg).items()
        }

    @property
    def _num_classes(self) -> int:
        return len(self.plan.dataset.classes or ())

    def _build(self, device: Any) -> Any:
        return self.stage.build(self.plan, device)

    def _trace(self, precision: Precision, samples: int, *, recompute: bool) -> MemoryTrace:
        found = self._traces.get((precision, samples, recompute))
        if found is None:
            data = self.plan.cfg.data
            seen = self._build, samples, data.channels, data.image_hw, data.labels, self._num_classes
            found = trace_memory(*seen, precision=precision, recompute=recompute)
            self._traces[precision, samples, recompute] = found
        return found

    @cached_property
    def _traces(self) -> dict[tuple[Precision, int, bool], MemoryTrace]:
        return {}


def sharding_options(stage_cfg: StageConfig) -> dict[str, dict[str, Any]]:
    """How the engine of these settings may share its state, by the name that a user knows."""
    cfg = stage_cfg.engine
    zeros = {f"ZeRO {stage}": {"zero": stage} for stage in (0, 1, 2, 3)}
    if cfg.kind == "deepspeed":
        return zeros
    if cfg.kind == "plain":
        return {"plain": {}}
    if cfg.sharding == "deepspeed":
        return zeros
    whole = {"DDP": {"sharding": "ddp"}}
    return whole if stage_cfg.optim.kind == "lars" else whole | {"FSDP2": {"sharding": "fsdp2"}}
