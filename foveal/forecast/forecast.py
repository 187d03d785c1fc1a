"""What a plan comes to on a cluster: memory, work, time and traffic, as numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foveal.engines.base import EngineConfig, Precision
from foveal.forecast.memory import Memory, memory_of, zero_stage
from foveal.forecast.trace import Flops, Trace, Weights, flops_of, trace_of, weights_of
from foveal.training.cli import Stage
from foveal.training.plan import Plan, StageConfig

_FP32, _BF16 = 4, 2
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs that a plan is made for: operations a second at best, the share of them that is reached, bytes.

    write_bytes: what all ranks together write a second to the run directory's disk.
    """

    nodes: int
    gpus: int
    mfu: float
    write_bytes: float
    rate: float | None = None
    memory: float | None = None

    @property
    def ranks(self) -> int:
        """One for every GPU."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Forecast:
    """A stage's plan on a machine."""

    stage: Stage[Any, Any]
    plan: Plan
    machine: Machine

    @cached_property
    def weights(self) -> Weights:
        return weights_of(self._build)

    @cached_property
    def flops(self) -> Flops:
        data = self.plan.cfg.data
        return flops_of(self._build, data.channels, data.sides, data.labels, self._classes)

    @cached_property
    def memory(self) -> Memory:
        return self.memory_under(self.plan.cfg.engine)

    def memory_under(self, cfg: EngineConfig, at_once: int | None = None) -> Memory:
        """The memory of a rank under another engine, or with fewer images at once."""
        plan = self.plan
        samples = at_once or plan.at_once
        micros = plan.at_once * plan.micros // samples
        trace = self._trace(cfg.precision, samples, recompute=cfg.recompute)
        return memory_of(self.weights, trace, cfg, plan.cfg.optim, ranks=plan.ranks, micros=micros)

    @cached_property
    def choices(self) -> dict[str, dict[str, Memory]]:
        """The memory of a rank by how the state is shared, then by precision and recomputation."""
        cfg = self.plan.cfg.engine
        ways = {
            f"{precision}{', recompute' if recompute else ''}": {"precision": precision, "recompute": recompute}
            for precision in _PRECISIONS
            for recompute in ((False, True) if self.weights.recomputes else (False,))
        }
        return {
            name: {way: self.memory_under(cfg.model_copy(update=change | how)) for way, how in ways.items()}
            for name, change in sharings(self.plan.cfg).items()
        }

    @property
    def sharing(self) -> str:
        """The row of ``choices`` that the config asks for."""
        cfg = self.plan.cfg.engine
        return next(name for name, change in sharings(self.plan.cfg).items() if cfg.model_copy(update=change) == cfg)

    @property
    def way(self) -> str:
        """The column of ``choices`` that the config asks for."""
        cfg = self.plan.cfg.engine
        return f"{cfg.precision}{', recompute' if cfg.recompute else ''}"

    @property
    def step_flops(self) -> float:
        """Of all ranks together."""
        return self.flops.both * self.plan.cfg.batch.images

    @property
    def step_seconds(self) -> float | None:
        """At the stated share of the GPUs' rate; nothing where that is not known."""
        rate = self.machine.rate
        return None if rate is None else self.step_flops / (self.machine.ranks * rate * self.machine.mfu)

    @property
    def seconds(self) -> float | None:
        """From the first step to the last, of every run that it comes to."""
        step = self.step_seconds
        return None if step is None else step * self.plan.steps * self.plan.runs

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and moments of what is trained, and what else the model keeps."""
        return (1 + self.plan.cfg.optim.moments) * _FP32 * self.weights.trained + self.weights.kept_bytes

    @property
    def save_seconds(self) -> float:
        """To write one checkpoint, by all ranks together."""
        return self.checkpoint_bytes / self.machine.write_bytes

    @property
    def image_bytes(self) -> float:
        """The mean of the first set's samples."""
        source = self.plan.training.sources[0]
        shards = source.dataset.manifest.splits[source.split].shards
        return sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))

    @property
    def images_per_second(self) -> float | None:
        """That a rank must decode, so that it never waits."""
        step = self.step_seconds
        return None if step is None else self.plan.cfg.batch.images / self.plan.ranks / step

    def traffic(self, cfg: EngineConfig) -> float:
        """Bytes that a rank sends in a step, where collectives go round a ring."""
        ranks, micros = self.plan.ranks, self.plan.micros
        share = (ranks - 1) / ranks
        whole = self.weights.trained * _FP32
        # DeepSpeed communicates gradients of linear layers in autocast's type.
        lowered = whole - (self.weights.products * (_FP32 - _BF16) if cfg.precision == "bf16" else 0)
        stage = zero_stage(cfg)
        if stage == 3:
            return share * micros * (lowered + lowered)  # weights once a micro, gradients once
        if stage == 2:
            return share * (micros * 2 * lowered + whole)  # all-reduce in every micro, updated weights once
        if stage == 1:
            return share * (2 * lowered + whole)
        if cfg.kind == "accelerate" and cfg.sharding == "fsdp2":
            return share * micros * 3 * whole  # weights forward and backward, gradients
        return share * 2 * whole

    @cached_property
    def traffics(self) -> dict[str, float]:
        """By how the state is shared."""
        cfg = self.plan.cfg.engine
        return {name: self.traffic(cfg.model_copy(update=change)) for name, change in sharings(self.plan.cfg).items()}

    @property
    def _classes(self) -> int:
        return len(self.plan.dataset.classes or ())

    def _build(self, device: Any) -> Any:
        return self.stage.parts(self.plan, device)

    def _trace(self, precision: Precision, samples: int, *, recompute: bool) -> Trace:
        found = self._traces.get((precision, samples, recompute))
        if found is None:
            data = self.plan.cfg.data
            seen = self._build, samples, data.channels, data.sides, data.labels, self._classes
            found = trace_of(*seen, precision=precision, recompute=recompute)
            self._traces[precision, samples, recompute] = found
        return found

    @cached_property
    def _traces(self) -> dict[tuple[Precision, int, bool], Trace]:
        return {}


def sharings(settings: StageConfig) -> dict[str, dict[str, Any]]:
    """How the engine of these settings may share its state, by the name that a user knows."""
    cfg = settings.engine
    zeros = {f"ZeRO {stage}": {"zero": stage} for stage in (0, 1, 2, 3)}
    if cfg.kind == "deepspeed":
        return zeros
    if cfg.kind == "plain":
        return {"plain": {}}
    if cfg.sharding == "deepspeed":
        return zeros
    whole = {"DDP": {"sharding": "ddp"}}
    return whole if settings.optim.kind == "lars" else whole | {"FSDP2": {"sharding": "fsdp2"}}
