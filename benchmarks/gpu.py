"""MAE of the paper's models on one GPU, in at most nine minutes on a fresh machine, the most important first.

    PYTHONPATH=.:tests/support python benchmarks/gpu.py --data FOLDER --out FILE

FOLDER has tar shards of photographs. Every line is written when it is measured, so that a machine that is taken back
leaves what it has measured; what fails, is refused or lacks time leaves a line that says so. Without a GPU tiny models
rehearse all of it on the CPU, which proves that the script runs and measures nothing.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from gpu_interrupted import interrupted_lines
from gpu_profile import profile_lines
from gpu_switches import SWITCH_HEADING, SWITCHES, TINY, SwitchedSteps
from gpu_training import CASE_HEADING, CONFIGS, Bench, case_row, first_cases, free_memory, other_cases
from loader import IndependentDecoders, data_config, launch_table, worker_table
from machine import described
from step import GPU_BATCH, PEER_HEADING, SHAPES, compare

from foveal.data.workers import WorkerPool
from foveal.distributed.world import World, init_world
from foveal.doctor.node_checks import measure_matmul_rates
from foveal.doctor.report import RankReport
from foveal.training.data_workers import choose_num_workers

_RESULTS = Path(__file__).parent / "results"
_REHEARSAL_MINUTES = 45.0


class OutOfTime(BaseException):
    """A measurement has had its seconds; no Exception, which a library may take for its own."""


@dataclass(frozen=True)
class Measurement:
    """Lines of a section. It is not begun with less than ``least`` seconds left, and ends after ``most``."""

    name: str
    least: float
    most: float
    lines: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Section:
    """Measurements under a title, for ``seconds`` at most; ``heading``: of their common table."""

    title: str
    seconds: float
    measurements: list[Measurement]
    heading: tuple[str, ...] = ()


class Report:
    """A file, and the terminal, that get each line at once."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            file.write_text("")

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
            if self._file is not None:
                with self._file.open("a") as stream:
                    stream.write(f"{line}\n")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds, and again every 5: a callback may have swallowed it."""

    def expire(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(section: Section, report: Report, end: float, *, is_limited: bool) -> None:
    """Add the lines of a section; ``end``: of everything, by the monotonic clock."""
    report.add("", f"## {section.title}", "", *section.heading)
    deadline = min(end, time.monotonic() + section.seconds) if is_limited else end
    for measurement in section.measurements:
        left = deadline - time.monotonic()
        reason = f"left out, {max(0.0, left):.0f} s are left"
        if left >= measurement.least:
            reason = _measure(measurement, report, min(left, measurement.most) if is_limited else left)
            free_memory()
        if reason:
            report.add(f"| {measurement.name} | {reason} |" if section.heading else f"{measurement.name}: {reason}.")


def _measure(measurement: Measurement, report: Report, seconds: float) -> str:
    """Add the lines of a measurement; return why it did not come to its end, in words."""
    try:
        with time_limit(seconds):
            for line in measurement.lines():
                report.add(line)
    except OutOfTime:
        return f"cut off after {seconds:.0f} s"
    except Exception as error:  # noqa: BLE001 - whatever it was, the measurements after it are wanted
        traceback.print_exc()
        text = (str(error) or type(error).__name__).splitlines()[0]
        return f"{type(error).__name__}: {text.replace('|', '/')[:300]}"
    return ""


def measure_peak(device: torch.device) -> tuple[float, str]:
    """Return the rate of large products in bf16, in operations per second, and a sentence."""
    report = RankReport("here", 0)
    measure_matmul_rates(report, device)
    rates = report.facts
    sentence = f"Large products run at {rates['bf16_rate'] / 1e12:,.4g} TFLOP/s in bf16 and {rates['fp32_rate'] / 1e12:,.4g} in fp32."
    return rates["bf16_rate"], sentence


def sections(bench: Bench, folder: Path, trace: Path | None) -> Iterator[Section]:
    """Everything after the peak, the most important first; seconds are of a GPU."""
    device = bench.world.device
    profiled = Measurement("profile", 20, 60, lambda: profile_lines(bench, trace, folder))
    yield Section("Twenty steps of ViT-B/16 under the plain engine, from JPEGs", 60, [profiled])
    first = [
        Measurement(case.name, 10, 45 if case.compilation == "eager" else 90, partial(case_row, bench, case))
        for case in first_cases()
    ]
    yield Section("The default engine and the plain one, from JPEGs", 170, first, CASE_HEADING)
    yield Section("Peers, from images on the device", 100, list(peers(bench)), PEER_HEADING)
    steps = SwitchedSteps(device, is_rehearsal=bench.is_rehearsal)
    switched = [Measurement(name, 5, 20, partial(steps.row, name)) for name in SWITCHES]
    yield Section("Parts of ViT-B/16's step, plain engine, images on the device", 50, switched, SWITCH_HEADING)
    loader = Measurement("loader", 25, 70, lambda: loader_lines(bench))
    yield Section("The loader beside a step of launches, and alone", 70, [loader])
    others = [
        Measurement(case.name, 10, 45 if case.compilation == "eager" else 90, partial(case_row, bench, case))
        for case in other_cases(["ViT-B/16"] if bench.is_rehearsal else CONFIGS)
    ]
    yield Section("The other engines, from JPEGs", 80, others, CASE_HEADING)
    interrupted = Measurement("interrupted run", 60, 200, lambda: interrupted_lines(bench, folder))
    yield Section("An interrupted run", 200, [interrupted])


def loader_lines(bench: Bench) -> Iterator[str]:
    """What the loader costs the thread that trains, and images per second by workers."""
    cfg, rounds, seconds = data_config(bench.data, bench.index), 3, 15.0
    with closing(IndependentDecoders(cfg)) as decoders:
        yield from launch_table(cfg, decoders, rounds, seconds, bench.world.device)
        yield ""
        yield from worker_table(cfg, decoders, rounds, seconds)


def peers(bench: Bench) -> Iterator[Measurement]:
    """Whole steps of foveal, of Hugging Face's ViTMAE and of a textbook's MAE, at 256 images or a rehearsal's few."""
    for least, most, name, compiled in (
        (25, 70, "ViT-L/16", False),
        (15, 40, "ViT-B/16", False),
        (45, 90, "ViT-B/16", True),
    ):
        if bench.is_rehearsal and compiled:
            continue  # compilers take minutes on a CPU; the engines' table rehearses them
        shape = TINY if bench.is_rehearsal else replace(SHAPES[name], batch=GPU_BATCH)
        options = Namespace(data=bench.data, compile=compiled, rounds=1 if bench.is_rehearsal else 5, steps=2)
        label = f"{name}{', compiled' if compiled else ''}"
        yield Measurement(label, least, most, partial(compare, name, shape, "bf16", options, bench.world.device))


def header(minutes: float, *, is_rehearsal: bool) -> list[str]:
    """The lines above the sections."""
    machine = f"{described(['torch', 'deepspeed', 'accelerate', 'timm', 'transformers', 'simplejpeg'])}."
    if is_rehearsal:
        return [
            "# CPU rehearsal of benchmarks/gpu.py: these are no results",
            "",
            f"Tiny models on a CPU, a few steps each: the script runs, and its numbers say nothing. {machine}",
        ]
    return [
        "# On a GPU",
        "",
        f"`PYTHONPATH=.:tests/support python benchmarks/gpu.py --data FOLDER --minutes {minutes:g}`; {machine}",
        "",
        "MAE in bf16, 256 images of 224 px a step. From JPEGs: a run's loader, engine and loop, without checkpoints and logs.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tar shards of photographs, train-*.tar")
    parser.add_argument("--out", type=Path, help="where the lines are written, as markdown")
    parser.add_argument("--trace", type=Path, help="where the profiler's trace is kept, *.json.gz")
    parser.add_argument("--minutes", type=float, default=8.5, help="all of it on a GPU, after the imports")
    options = parser.parse_args()
    start = time.monotonic()
    is_rehearsal = not torch.cuda.is_available()
    if is_rehearsal and options.out and options.out.resolve().is_relative_to(_RESULTS):
        parser.error("no GPU here: a rehearsal is no result, name another file for --out")
    seconds = 60.0 * (_REHEARSAL_MINUTES if is_rehearsal else options.minutes)
    report = Report(options.out)
    report.add(*header(options.minutes, is_rehearsal=is_rehearsal))
    num_workers = 1 if is_rehearsal else choose_num_workers(len(os.sched_getaffinity(0)), None)
    with (
        tempfile.TemporaryDirectory() as name,
        closing(WorkerPool(num_workers, 120.0)) as workers,
        init_world(300) as world,
    ):
        run(world, workers, options, Path(name), report, start + seconds)
    report.add("", f"{time.monotonic() - start:.0f} s in all; {num_workers} workers of the loader.")


def run(world: World, workers: WorkerPool, options: Namespace, folder: Path, report: Report, end: float) -> None:
    """Measure everything until the end, by the monotonic clock."""
    rate, sentence = measure_peak(world.device)
    report.add("", sentence)
    bench = Bench.open(options.data, folder, world, workers, rate)
    for section in sections(bench, folder, options.trace):
        run_section(section, report, end, is_limited=not bench.is_rehearsal)


if __name__ == "__main__":
    sys.exit(main())
