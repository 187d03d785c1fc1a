"""Training of the paper's models in this process: the product's plan, loader, engine and loop. Run by gpu.py."""

import gc
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from foveal.data.indexing.index import index_folder
from foveal.data.loader import train_batches
from foveal.data.workers import WorkerPool
from foveal.distributed.world import World
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.training.cli import load_config
from foveal.training.loop import LoopContext, Step, build_stage_engine, run_steps
from foveal.training.meters.host_copy import HostCopy
from foveal.training.meters.metric_accumulator import MetricAccumulator
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.rollback import RollbackController
from pretrain.run import STAGE

CONFIGS = {"ViT-B/16": "mae_vit_b16", "ViT-L/16": "mae_vit_l16"}
ENGINES: dict[str, tuple[str, ...]] = {
    "plain": ("engine.kind=plain",),
    "DDP": ("engine.kind=accelerate", "engine.sharding=ddp"),
    "FSDP2": ("engine.kind=accelerate", "engine.sharding=fsdp2"),
} | {f"ZeRO {stage}": ("engine.kind=deepspeed", f"engine.zero={stage}") for stage in range(4)}
COMPILE = {"eager": "false", "compiled by block": "blocks", "compiled whole": "true"}
SETTINGS = (
    "batch.global_size=256", "batch.max_micro_size=256", "epochs=40", "optim.warmup_epochs=4", "data.lanes=16",
    "engine.precision=bf16",
)  # fmt: skip
# Of a rehearsal: the same modules at sizes that compute in no time.
TINY = (
    "batch.global_size=16", "batch.max_micro_size=16", "data.image_size=64", "data.lanes=8", "model.width=24", "model.heads=2",
    "model.depth=1", "decoder.width=16", "decoder.heads=2", "decoder.depth=1",
)  # fmt: skip
_LINEAR = torch.nn.functional.linear  # ZeRO 3 replaces it for the rest of a process
_WARM_UP = 8  # steps that no rate counts: the compiler, moments, the first data


@dataclass(frozen=True)
class Bench:
    """The shards of photographs, their index and the loader's workers, which all trainings share; and the device.

    ``bf16_rate``: operations per second of large products; ``is_rehearsal``: tiny models on a CPU.
    """

    data: Path
    index: Path
    world: World
    workers: WorkerPool
    is_rehearsal: bool
    bf16_rate: float
    windows: int = 4
    steps_per_window: int = 8

    @classmethod
    def open(cls, data: Path, folder: Path, world: World, workers: WorkerPool, bf16_rate: float) -> "Bench":
        """Index the shards."""
        index_folder(str(data), folder / "index")
        is_rehearsal = world.device.type != "cuda"
        steps = 2 if is_rehearsal else 8
        return cls(data, folder / "index", world, workers, is_rehearsal, bf16_rate, steps_per_window=steps)

    def overrides(self, *further: str) -> list[str]:
        """Settings of every training, in the words of a command line."""
        tiny = TINY if self.is_rehearsal else ()
        return [*SETTINGS, *tiny, f"data.path={self.data}", f"data.index={self.index}", *further]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)


class Training:
    """Steps of a model under an engine, from JPEGs in shards."""

    def __init__(self, bench: Bench, steps: Iterator[Step], context: LoopContext) -> None:
        self._bench, self._context = bench, context
        self._steps = _bound_steps_in_flight(steps)

    def run(self, count: int) -> float:
        """Make so many steps, wait for them and return the last loss; rates are of these steps."""
        self._context.throughput_meter.pop_rates()
        for _ in range(count):
            next(self._steps)
        loss = self._context.metric_accumulator.pop_rows(self._bench.world.all_reduce_sum)[-1]["loss"]
        self._bench.synchronize()
        return loss

    def rates(self) -> dict[str, float]:
        """Return images_per_second and data_wait of the last steps."""
        return self._context.throughput_meter.read_rates()


def _bound_steps_in_flight(steps: Iterator[Step]) -> Iterator[Step]:
    """Let the host run ahead of the device as far as a run does."""
    unread: deque[HostCopy] = deque()
    for step in steps:
        assert step.result is not None
        unread.append(HostCopy(step.result.applied))
        if len(unread) > RollbackController.steps_in_flight:
            assert unread.popleft().read(), f"an update before step {step.index} was refused"
        yield step


@contextmanager
def open_training(bench: Bench, model: str, *overrides: str) -> Iterator[Training]:
    """Build a model and its engine. Raises: ConfigError for settings that this version does not have."""
    world = bench.world
    cfg = load_config(STAGE.config_class, STAGE.name, CONFIGS[model], bench.overrides(*overrides))
    plan = STAGE.functions.build_plan(cfg, 1)
    setup = STAGE.functions.build(plan, world.device)
    engine = build_stage_engine(setup, plan, world)
    context = LoopContext(
        after_step=0,
        last_step=plan.total_steps,
        accumulation_steps=plan.accumulation_steps,
        lr_schedule=plan.compute_lr,
        world=world,
        metric_accumulator=MetricAccumulator(),
        throughput_meter=ThroughputMeter(),
        straggler_meter=StragglerMeter(world.device, "here"),
        heartbeat=lambda *_: None,
        on_batches_consumed=lambda *_: None,
    )
    with train_batches(
        plan.training_set,
        plan.cfg.data,
        rank=0,
        world_size=1,
        microbatch_size=plan.microbatch_size,
        start_step=0,
        stop_step=plan.total_steps,
        mean=plan.mean,
        workers=bench.workers,
    ) as batches:
        yield Training(bench, run_steps(engine, batches, setup.objective, context), context)


@cache
def flops_per_image(bench: Bench, model: str) -> float:
    """Operations of forward and backward of one image."""
    cfg = load_config(STAGE.config_class, STAGE.name, CONFIGS[model], bench.overrides("engine.kind=plain"))
    plan = STAGE.functions.build_plan(cfg, 1)
    return Forecast(STAGE, plan, ClusterSpec(1, 1, 1.0, 1e9)).flops_per_sample.forward_backward


def free_memory() -> None:
    """Free what an earlier training held, compiled code included, and undo what it left in torch."""
    torch.compiler.reset()
    torch.nn.functional.linear = _LINEAR
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Case:
    """A row of the table of engines."""

    model: str
    engine: str
    compilation: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.engine}, {self.compilation}"


_COLUMNS = (
    "training", "images/s, median (lowest-highest)", "MFU of the measured rate", "waits for data", "peak memory, GiB",
    f"build and first {_WARM_UP} steps, s", "loss",
)  # fmt: skip
CASE_HEADING = (f"| {' | '.join(_COLUMNS)} |", f"|---{'|--:' * (len(_COLUMNS) - 1)}|")


def case_row(bench: Bench, case: Case) -> Iterator[str]:
    """Train a case for a few windows of steps; yield its row."""
    flops = flops_per_image(bench, case.model)
    on_gpu = torch.cuda.is_available()
    memory_before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    settings = (*ENGINES[case.engine], f"engine.compile={COMPILE[case.compilation]}")
    with open_training(bench, case.model, *settings) as training:
        loss = training.run(_WARM_UP)
        start_seconds = time.perf_counter() - start
        rates = []
        for _ in range(bench.windows):
            loss = training.run(bench.steps_per_window)
            rates.append(training.rates())
    paces = [rate["images_per_second"] for rate in rates]
    pace, wait = statistics.median(paces), statistics.mean(rate["data_wait"] for rate in rates)
    memory = (torch.cuda.max_memory_allocated() - memory_before) / 2**30 if on_gpu else 0.0
    yield (
        f"| {case.name} | {pace:,.0f} ({min(paces):,.0f}-{max(paces):,.0f}) | {pace * flops / bench.bf16_rate:.1%} | "
        f"{wait:.0%} | {memory:.2f} | {start_seconds:.1f} | {loss:.4f} |"
    )


def first_cases() -> list[Case]:
    """The default engine and the plain one, on both models: eager, by block, whole."""
    return [
        Case(model, engine, compilation)
        for compilation in COMPILE
        for model in CONFIGS
        for engine in ("ZeRO 1", "plain")
    ]


def other_cases(models: Iterable[str]) -> list[Case]:
    """Every other engine."""
    engines = [engine for engine in ENGINES if engine not in ("ZeRO 1", "plain")]
    return [Case(model, engine, compilation) for model in models for compilation in COMPILE for engine in engines]
