"""What do worker processes of the loader give, and what do they take from the thread that trains?

    FOVEAL_TEST_DATA=... python benchmarks/loader.py --out benchmarks/results/loader.md

All numbers are of one trainer on one machine, on JPEGs of street scenes of CamVid in the page cache. Everything that is
compared takes turns, in an order that changes from round to round; a ratio is the median over the rounds.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contenders import BATCH, MEAN, SCALE, SIDE, STD
from data import write_photographs
from machine import described

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.workers import WorkerPool

STEPS_PER_EPOCH = 8
SMALL_OPERATIONS = 1500  # of a step whose time is that of launching


def batches(folder: Path, workers: WorkerPool | None, start: int, stop: int) -> "Iterator[Batch]":
    """The batches of some steps."""
    tree = {"path": str(folder / "shards"), "image_size": SIDE, "lanes": 8, "augment": {"scale": SCALE}}
    cfg = DataConfig.from_dict({**tree, "mean": MEAN, "std": STD}, "the benchmark")
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=BATCH)
    with train_batches(
        training,
        cfg,
        rank=0,
        world_size=1,
        microbatch_size=BATCH,
        start_step=start,
        stop_step=stop,
        workers=workers,
    ) as made:
        yield from made


def rate(folder: Path, workers: WorkerPool | None, steps: int = STEPS_PER_EPOCH) -> float:
    """Images per second after the first batch."""
    made = batches(folder, workers, 0, steps + 1)
    next(made)
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in made)
    return count / (time.perf_counter() - start)


def decode_alone(folder: Path, pipe: Connection) -> None:
    """A process that decodes by itself, as often as it is asked."""
    torch.set_num_threads(1)
    while pipe.recv():
        pipe.send(rate(folder, None))


def step() -> None:
    """Many small operations, one after the other: what a step is whose kernels wait for their launches."""
    values = torch.ones(16)
    for _ in range(SMALL_OPERATIONS):
        values = (values * 1.0001).clamp(0, 2)


def step_seconds(folder: Path, workers: WorkerPool | None, steps: int = 40) -> float:
    """Median seconds of a step beside the loader, and what it takes of this thread; without one if ``workers`` is None.

    Waiting for a batch is no cost of a step here: how fast batches come is measured apart.
    """
    made = None if workers is None else batches(folder, workers, 0, steps)
    seconds = []
    for _ in range(steps):
        start_cpu = time.thread_time()
        batch = None if made is None else next(made)
        fetching = time.thread_time() - start_cpu
        start = time.perf_counter()
        step()
        seconds.append(fetching + time.perf_counter() - start)
        del batch
    return statistics.median(seconds)


def interleaved(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The results of each way, by round."""
    results: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)[:: 1 if number % 2 else -1]
        for name in names:
            results[name].append(ways[name]())
    return results


def ratio(results: dict[str, list[float]], one: str, other: str) -> str:
    """Median, lowest and highest of a ratio over the rounds."""
    ratios = [mine / its for mine, its in zip(results[one], results[other], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def report(folder: Path, rounds: int) -> Iterator[str]:
    """The measurements, line by line."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    decoders = [context.Process(target=decode_alone, args=(folder, other), daemon=True) for _, other in pairs]
    for decoder in decoders:
        decoder.start()

    def both_decode() -> float:
        for pipe, _ in pairs:
            pipe.send(True)
        return sum(pipe.recv() for pipe, _ in pairs)

    def beside_a_decoder_apart() -> float:
        """Like beside a worker, as far as cores and memory are concerned, without anything in common."""
        pairs[0][0].send(True)
        seconds = step_seconds(folder, None)
        pairs[0][0].recv()
        return seconds

    with closing(WorkerPool(1, 600.0)) as one, closing(WorkerPool(2, 600.0)) as two:
        ways: dict[str, Callable[[], float]] = {
            "here": lambda: rate(folder, None),
            "1 worker": lambda: rate(folder, one),
            "2 workers": lambda: rate(folder, two),
            "2 independent decoders": both_decode,
        }
        interleaved(ways, 1)  # warms up
        rates = interleaved(ways, rounds)
        yield from ("| reader | images per second |", "|---|--:|")
        for name, values in rates.items():
            yield f"| {name} | {statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f}) |"
        yield ""
        yield f"1 worker over the trainer itself: {ratio(rates, '1 worker', 'here')}. "
        yield f"2 workers over 1: {ratio(rates, '2 workers', '1 worker')}. "
        yield f"2 workers over 2 independent decoders: {ratio(rates, '2 workers', '2 independent decoders')}."
        steps = interleaved(
            {
                "alone": lambda: step_seconds(folder, None),
                "beside": lambda: step_seconds(folder, one),
                "beside a decoder apart": beside_a_decoder_apart,
            },
            rounds,
        )
        alone = statistics.median(steps["alone"])
        yield ""
        yield f"A step of {2 * SMALL_OPERATIONS:,} small operations, alone: {1000 * alone:.1f} ms. "
        yield f"Beside 1 worker, with what the loader takes of the thread, over alone: {ratio(steps, 'beside', 'alone')}; over "
        yield f"the same beside a decoder that is no part of this run: {ratio(steps, 'beside', 'beside a decoder apart')}."
    for pipe, _ in pairs:
        pipe.send(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the report is written, as markdown")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="a sentence about the machine, such as what else ran")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="foveal-benchmark-") as name:
        write_photographs(Path(name) / "photographs", 400, 300, BATCH * STEPS_PER_EPOCH)
        lines = []
        for line in report(Path(name) / "photographs", given.rounds):
            print(line, flush=True)
            lines.append(line)
    about = (
        f"`python benchmarks/loader.py --rounds {given.rounds}`: JPEGs of 400 x 300 to {SIDE} x {SIDE}, batches of {BATCH}. "
        f"Medians (lowest-highest). Machine: {described(['torch', 'simplejpeg'])}. {given.note}"
    )
    text = "\n".join(["# Worker processes of the loader", "", about.strip(), "", *lines, ""])
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
