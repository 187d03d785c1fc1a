"""foveal's worker processes: the images that they read, and what they take from the thread that trains. Run by data.py.

Everything that is compared takes turns, in an order that changes from round to round; a ratio is the median over the
rounds. Shards lie in the page cache.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contenders import BATCH, MEAN, SCALE, SIDE, STD

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.workers import WorkerPool

_BATCHES_PER_WORKER = 32  # of one measurement: two seconds
# A step whose time is that of launching takes longer than a worker reads its images, as in training that is not bound by
# data: after a wait of tenths of a second the same operations run on cold caches, with a loader and without one.
_SMALL_OPERATIONS = 8000  # pairs
_LAUNCH_BATCH = 16
_STEPS = 40
_STALL_SECONDS = 600.0
_UNTIL_TOLD = 0  # in place of a number of batches


def data_config(shards: Path, index: Path | None = None) -> DataConfig:
    """MAE's random crops of the shards."""
    tree = {"path": str(shards), "image_size": SIDE, "lanes": 8, "augment": {"scale": SCALE}, "mean": MEAN, "std": STD}
    return DataConfig.from_dict(tree | ({"index": str(index)} if index else {}), "the benchmark")


def worker_counts(cores: int) -> list[int]:
    """0, the powers of two below ``cores``, and ``cores``."""
    return [0, *(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


def read_batches(cfg: DataConfig, workers: WorkerPool | None, stop: int, size: int = BATCH) -> Iterator[Batch]:
    """Yield the batches of ``size`` images of the first ``stop`` steps; None: read by this thread."""
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=size)
    with train_batches(
        training, cfg, rank=0, world_size=1, microbatch_size=size, start_step=0, stop_step=stop, workers=workers
    ) as batches:
        yield from batches


def images_per_second(cfg: DataConfig, workers: WorkerPool | None, num_batches: int) -> float:
    """Rate of the batches after the first."""
    batches = read_batches(cfg, workers, num_batches + 1)
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch.ids) for batch in batches)
    return count / (time.perf_counter() - start)


class IndependentDecoders:
    """A process for each core, which decodes as the trainer does without workers and has nothing in common with it."""

    def __init__(self, cfg: DataConfig) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in os.sched_getaffinity(0)]
        self._pipes = [here for here, _ in pairs]
        self._processes = [context.Process(target=_decode, args=(cfg, there), daemon=True) for _, there in pairs]
        for process in self._processes:
            process.start()

    def images_per_second(self) -> float:
        """Sum of the rates at which all decode at once."""
        for pipe in self._pipes:
            pipe.send(_BATCHES_PER_WORKER)
        return sum(pipe.recv() for pipe in self._pipes)

    @contextmanager
    def busy(self, count: int) -> Iterator[None]:
        """Let so many of them decode meanwhile."""
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send(_UNTIL_TOLD)
        for pipe in pipes:
            pipe.recv()
        yield
        for pipe in pipes:
            pipe.send(None)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def _decode(cfg: DataConfig, pipe: Connection) -> None:
    """Decode so many batches and answer their rate; or answer at once and decode until told; None ends it."""
    torch.set_num_threads(1)
    while (num_batches := pipe.recv()) is not None:
        if num_batches != _UNTIL_TOLD:
            pipe.send(images_per_second(cfg, None, num_batches))
            continue
        pipe.send(True)
        for _ in read_batches(cfg, None, 10**9):
            if pipe.poll():
                pipe.recv()
                break


def launch_many_operations(device: torch.device) -> None:
    """Run small operations, one after the other: a step that takes as long as its launches."""
    values = torch.ones(16, device=device)
    for _ in range(_SMALL_OPERATIONS):
        values = (values * 1.0001).clamp(0, 2)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(cfg: DataConfig, workers: WorkerPool | None, device: torch.device) -> float:
    """Median seconds of a host-bound step, with what the loader takes of its thread; None: without a loader.

    Waiting for a batch is no cost of a step here: how fast batches come is measured apart.
    """
    batches = None if workers is None else read_batches(cfg, workers, _STEPS, _LAUNCH_BATCH)
    seconds = []
    for _ in range(_STEPS):
        start_cpu = time.thread_time()
        batch = None if batches is None else next(batches)
        fetching = time.thread_time() - start_cpu
        start = time.perf_counter()
        launch_many_operations(device)
        seconds.append(fetching + time.perf_counter() - start)
        del batch
    return statistics.median(seconds)


def interleave(ways: dict[str, Callable[[], float]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Results of each way by round, after one that warms up; ``seconds`` end it early, after three rounds at least."""
    results: dict[str, list[float]] = {name: [] for name in ways}
    for measure in ways.values():
        measure()
    start = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - start > seconds:
            break
        for name in list(ways)[:: -1 if number % 2 else 1]:
            results[name].append(ways[name]())
    return results


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    """Median, lowest and highest of a ratio over the rounds."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def worker_table(cfg: DataConfig, decoders: IndependentDecoders, rounds: int, seconds: float) -> Iterator[str]:
    """Images per second by number of workers, and of as many independent decoders as there are cores."""
    cores = len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {}
        for count in worker_counts(cores):
            pool = stack.enter_context(closing(WorkerPool(count, _STALL_SECONDS))) if count else None
            ways[f"{count}"] = _rate_of(cfg, pool, max(1, count))
        ways[f"{cores} independent decoders"] = decoders.images_per_second
        rates = interleave(ways, rounds, seconds)
    yield from ("| workers | images per second | over 1 worker | over the independent decoders |", "|---|--:|--:|--:|")
    for name, values in rates.items():
        control = ratio(values, rates[f"{cores} independent decoders"]) if name == f"{cores}" else ""
        yield (
            f"| {name} | {statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f}) | "
            f"{ratio(values, rates['1'])} | {control} |"
        )


def _rate_of(cfg: DataConfig, pool: WorkerPool | None, processes: int) -> Callable[[], float]:
    return lambda: images_per_second(cfg, pool, _BATCHES_PER_WORKER * processes)


def launch_table(
    cfg: DataConfig, decoders: IndependentDecoders, rounds: int, seconds: float, device: torch.device
) -> Iterator[str]:
    """Milliseconds of a host-bound step alone, beside the loader, and beside as many processes that are no part of it."""
    count = max(1, len(os.sched_getaffinity(0)) - 1)
    with closing(WorkerPool(count, _STALL_SECONDS)) as pool:

        def beside_decoders() -> float:
            with decoders.busy(count):
                return step_seconds(cfg, None, device)

        beside, control = f"beside {count} of the loader's workers", f"beside {count} independent decoders"
        ways = {
            "alone": lambda: step_seconds(cfg, None, device),
            beside: lambda: step_seconds(cfg, pool, device),
            control: beside_decoders,
        }
        steps = interleave(ways, rounds, seconds)
    yield f"A step of {2 * _SMALL_OPERATIONS:,} small operations on the {device.type}; what the loader takes of the thread counts."
    yield from ("", "| step | ms | over alone |", "|---|--:|--:|")
    for name, values in steps.items():
        low, middle, high = (1e3 * value for value in (min(values), statistics.median(values), max(values)))
        yield f"| {name} | {middle:.1f} ({low:.1f}-{high:.1f}) | {ratio(values, steps['alone'])} |"
    yield from ("", f"Beside the loader over beside the independent decoders: {ratio(steps[beside], steps[control])}.")
