"""Seconds of a step: measured with the model itself on this machine, or from the forecast for a stated GPU."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.cgroups import count_usable_cores
from foveal.commands.init.data_facts import DataFacts
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.image.decode import decode_crop
from foveal.data.image.transforms import UNIFORMS_PER_CROP, compute_train_crop, normalise
from foveal.distributed.world import World
from foveal.engines.plain import PlainEngine
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.forecast.gpu_specs import find_gpu_spec
from foveal.forecast.mfu import MEASURED_MFU
from foveal.training.data_workers import choose_num_workers
from foveal.training.loop import TrainingSetup
from foveal.training.plan import Plan
from foveal.training.stage import Stage

_MEASURED_SECONDS = 2.0  # for each of forward and backward, and of the forward alone
_MAX_REPEATS = 8
_MAX_LOST_SHARE = 0.25  # of the time of a call; where other programs take more, the run is planned too short
_RESERVE = 1.1  # for what a step does beside: its batch, its metrics, a checkpoint now and then


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step and of the evaluation of one image, with all ranks; ``source``: how they are known."""

    step_seconds: float
    evaluation_seconds: float
    source: str


def has_gpu() -> bool:
    """Return whether this machine has a GPU to measure on."""
    return torch.cuda.is_available()


def forecast_speed(stage: Stage[Any, Any], plan: Plan, gpu: str) -> Speed:
    """Return the speed on this GPU, one for each rank, by ``foveal plan``'s count of operations."""
    flops = find_gpu_spec(gpu).peak_tflops(plan.cfg.engine) * 1e12
    cluster = ClusterSpec(1, plan.world_size, MEASURED_MFU, 1e9, gpu_flops_per_second=flops)
    step_seconds = Forecast(stage, plan, cluster).step_seconds
    assert step_seconds is not None
    gpus = f"{plan.world_size} x {gpu}"
    source = f"forecast for {gpus} at {MEASURED_MFU:.1%} of the peak; not measured here: see the first steps' images/s"
    return Speed(step_seconds, step_seconds / plan.cfg.batch.global_size, source)


def measure_speed(stage: Stage[Any, Any], plan: Plan, facts: DataFacts) -> Speed:
    """Run the plan's model on this machine for a few seconds, on random pixels, and decode a few images.

    On CPUs the ranks have the cores to themselves: one rank has a thread for each core, several have one thread each,
    as torchrun starts them. Processes that decode take cores from them.
    """
    on_gpu = has_gpu()
    device, ranks = torch.device("cuda" if on_gpu else "cpu"), plan.world_size
    decode_seconds = _measure_decoding(plan.cfg.data, facts)
    threads_before = torch.get_num_threads()
    threads = threads_before if ranks == 1 or on_gpu else 1
    torch.set_num_threads(threads)
    try:
        update_seconds, forward_seconds, lost_share = _measure_model(stage, plan, device)
    finally:
        torch.set_num_threads(threads_before)
    batch_size, cores = plan.cfg.batch.global_size, count_usable_cores()
    workers = plan.cfg.data.workers
    if workers == "auto":
        workers = choose_num_workers(cores // ranks, decode_seconds * plan.steps_per_epoch * batch_size / ranks)
    busy_cores = 0 if on_gpu else min(cores, ranks * threads)

    def with_decoding(seconds: float, images: int) -> float:
        """Add the decoding of these images: by workers, which take cores from the model, or by the ranks themselves."""
        work = decode_seconds * images
        if not workers:
            return seconds + work / ranks
        return max(seconds, (seconds * busy_cores + work) / cores, work / (ranks * workers))

    source = f"measured on this machine with {ranks} rank{'s' if ranks > 1 else ''}"
    source += " on its GPU" if on_gpu else f" of {threads} thread{'s' if threads > 1 else ''}"
    if not on_gpu and lost_share > _MAX_LOST_SHARE:
        source += f"; other programs took {lost_share:.0%} of the time: run init again when they have ended"
    step_seconds = _RESERVE * with_decoding(update_seconds, batch_size)
    return Speed(step_seconds, with_decoding(forward_seconds / ranks, 1), source)


def _measure_decoding(cfg: DataConfig, facts: DataFacts) -> float:
    """Return the seconds in which one thread decodes and crops an image for training."""
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for data in facts.images:
        uniforms = generator.random(UNIFORMS_PER_CROP, dtype=np.float32)

        def choose_crop(width: int, height: int, uniforms: np.ndarray = uniforms) -> Any:
            return compute_train_crop(width, height, uniforms, cfg.augment, cfg.image_hw)

        decode_crop(
            data,
            cfg.channels,
            choose_crop,
            cfg.image_hw,
            cfg.augment.interpolation,
            cfg.jpeg_scaling,
            bit_depth=facts.bit_depth,
        )
    return (time.perf_counter() - start) / len(facts.images)


def _measure_model(stage: Stage[Any, Any], plan: Plan, device: torch.device) -> tuple[float, float, float]:
    """Return the seconds of a rank's step, of a forward without gradients of one image, and the share that was lost.

    The share is that of a training call in which this thread had no core.
    """
    cfg, size = plan.cfg, plan.microbatch_size
    setup: TrainingSetup[Any] = stage.functions.build(plan, device)
    engine = PlainEngine(setup.model, setup.param_groups, cfg.optim, cfg.engine, World(0, 1, 0, "none", device), 1)
    engine.set_lr(1e-6)
    batch = _random_batch(plan, size).to(device)

    def train() -> None:
        with engine.microbatch(last=True):
            loss, _ = setup.objective(engine.model, batch)
            engine.backward(loss / size)

    def evaluate() -> None:
        with engine.eval_mode():
            if cfg.evaluates_knn:
                engine.model(normalise(batch.images, plan.mean, plan.std), features_only=True)
            else:
                setup.objective(engine.model, batch)

    train_seconds, train_cpu_seconds = _time_shortest_call(train, device)
    step_seconds, _ = _time_shortest_call(engine.step, device)
    forward_seconds, _ = _time_shortest_call(evaluate, device)
    update_seconds = train_seconds * plan.accumulation_steps + step_seconds
    return update_seconds, forward_seconds / size, 1 - train_cpu_seconds / train_seconds


def _time_shortest_call(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the seconds of the shortest of a few calls, and those in which this thread had a core.

    One call before warms up. Other programs lengthen some calls.
    """
    work()
    calls: list[tuple[float, float]] = []
    while sum(seconds for seconds, _ in calls) < _MEASURED_SECONDS and len(calls) < _MAX_REPEATS:
        _synchronize(device)
        start, cpu_start = time.perf_counter(), time.thread_time()
        work()
        _synchronize(device)
        calls.append((time.perf_counter() - start, time.thread_time() - cpu_start))
    return min(calls)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random_batch(plan: Plan, size: int) -> Batch:
    """Return a microbatch of random pixels, of the first class, with a typical label for each image."""
    data = plan.cfg.data
    ids = torch.arange(size)
    images = torch.randint(0, 256, (size, data.channels, *data.image_hw), dtype=torch.uint8)
    targets: Tensor | None = None
    if plan.label_reader is not None:
        targets = plan.label_reader.collate([plan.label_reader.example_label(data.image_hw)] * size, data.image_hw)
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(images, zeros, ids, ids, ids >= 0, step=0, epoch=0, microbatch_index=0, targets=targets)
