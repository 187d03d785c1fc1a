"""JPEGs in tars to batches, and samples' bytes out of tars, per core: foveal and its peers; and foveal's workers.

    FOVEAL_TEST_DATA=... python benchmarks/data.py --out benchmarks/results/data.md \
        --python litdata=VENV/bin/python --python streaming=VENV/bin/python --python "DALI (CPU)=VENV/bin/python"

Every contender of contenders.py has a process of its own, in the Python that is named for it (default: this one), and
they take turns, one pass over the data each, in an order that changes from round to round. What is not installed is
left out with a line. loader.py measures the workers, and what they cost the thread that trains. The pictures are street
scenes of CamVid; they lie in the page cache.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from contenders import BATCH, CONTENDERS
from loader import IndependentDecoders, data_config, launch_table, worker_table
from machine import described
from photographs import QUALITY, write_photographs, write_shards

SMALL, SMALL_BYTES = 20_000, 3_000  # samples of the table of bytes, and their size
IMAGES = {(400, 300): 512, (1024, 768): 128}
OUTPUTS = ("uint8", "float")
TABLES = ("bytes", "images", "workers", "launches")
REFERENCE, BYTES_REFERENCE = "webdataset + PIL", "webdataset: bytes"
_FEWEST_ROUNDS = 3


@dataclass
class Contender:
    """A process that does a pass when asked."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    package: str = ""
    rates: list[float] = field(default_factory=list)  # items per second, one a round
    thrift: list[float] = field(default_factory=list)  # items per second of processor time, of the process alone

    def answer(self) -> dict:
        """What it says next; empty if it died."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline() or "{}")

    def go(self) -> None:
        """One pass."""
        assert self.process.stdin
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found = self.answer()
        if not found:
            sys.exit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        self.rates.append(found["items"] / found["seconds"])
        self.thrift.append(found["items"] / found["processor"])

    def end(self) -> None:
        """Let it leave."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def started(names: list[str], pythons: dict[str, str], folder: Path, output: str, cores: int) -> list[Contender]:
    """Those that are there, ready and warm; a line for each of the others."""
    ready = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("contenders.py"))
    for name in names:
        command = [pythons.get(name, sys.executable), script, name, str(folder), output, str(cores)]
        log = folder / f"{name} {output} {cores}.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        one = Contender(name, process, log)
        told = one.answer()
        if "ready" in told:
            one.package = told["ready"]
            ready.append(one)
        else:
            reason = told.get("absent") or log.read_text()[-1000:]
            print(f"{name} is left out: {reason}", file=sys.stderr)
            one.end()
    return ready


def raced(names: list[str], folder: Path, output: str, cores: int, given: argparse.Namespace) -> list[Contender]:
    """Rounds in which all take turns: as many as are asked for, or as fit into the seconds."""
    runners = started(names, given.pythons, folder, output, cores)
    start = time.monotonic()
    for number in range(given.rounds):
        if number >= _FEWEST_ROUNDS and time.monotonic() - start > given.seconds:
            break
        for turn in range(len(runners)):
            runners[(number + turn) % len(runners)].go()
    for runner in runners:
        runner.end()
    return runners


def table(runners: list[Contender], reference: str, unit: str, cores: int) -> list[str]:
    """Rates per core as medians with lowest and highest; the median over the rounds of the ratio to the reference.

    On one core the processor time is told too: on a machine that others use it is the steadier of the two.
    """
    base = next((runner for runner in runners if runner.name == reference), None)
    kinds = ["rates", "thrift"] if cores == 1 else ["rates"]
    titles = {"rates": f"{unit} per second and core", "thrift": f"{unit} per second of processor time"}
    lines = ["".join(f"| {titles[kind]} | ratio " for kind in kinds) + "|", "|---" + "|--:|--:" * len(kinds) + "|"]
    lines[0] = "| " + lines[0]
    for one in runners:
        line = f"| {one.name} "
        for kind in kinds:
            rates = [rate / cores for rate in getattr(one, kind)]
            pairs = zip(getattr(one, kind), getattr(base, kind), strict=True) if base else ()
            ratio = f"{statistics.median([mine / its for mine, its in pairs] or [float('nan')]):.2f}"
            line += f"| {statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) | {ratio} "
        lines.append(f"{line}|")
    return lines


def byte_table(place: Path, given: argparse.Namespace) -> Iterator[str]:
    """The table of samples' bytes."""
    names = [name for name in given.only if "bytes" in name]
    noise = np.random.default_rng(0)
    write_shards(place / "small" / "shards", "png", [noise.bytes(SMALL_BYTES) for _ in range(SMALL)])
    runners = raced(names, place / "small", "bytes", 1, given)
    yield f"## Bytes of samples ({SMALL:,} of {SMALL_BYTES:,} bytes) out of tars, on 1 core, {_rounds(runners)}"
    yield from ("", *table(runners, BYTES_REFERENCE, "samples", 1))


def image_tables(place: Path, given: argparse.Namespace, packages: set[str]) -> Iterator[list[str]]:
    """A table for every size, output and number of cores."""
    names = [name for name in given.only if "bytes" not in name]
    for (width, height), count in IMAGES.items():
        folder = place / f"{width}x{height}"
        size = write_photographs(folder, width, height, count)
        for cores, output in itertools.product(given.cores, given.outputs):
            runners = raced(names, folder, output, cores, given)
            packages.update(runner.package for runner in runners)
            where = f"{cores} core{'s' * (cores > 1)}, {_rounds(runners)}"
            heading = f"## JPEGs of {width} x {height} ({size / 1000:.0f} kB) to {output}, on {where}"
            yield [heading, "", *table(runners, REFERENCE, "images", cores)]


def _rounds(runners: list[Contender]) -> str:
    return f"{max((len(runner.rates) for runner in runners), default=0)} rounds"


def tables(place: Path, given: argparse.Namespace, packages: set[str]) -> Iterator[list[str]]:
    """The tables that are asked for, one after the other."""
    if "bytes" in given.tables:
        yield list(byte_table(place, given))
    if "images" in given.tables:
        yield from image_tables(place, given, packages)
    if not {"workers", "launches"} & set(given.tables):
        return
    (width, height), count = next(iter(IMAGES.items()))
    if not (folder := place / f"{width}x{height}").exists():
        write_photographs(folder, width, height, count)
    cfg, limits = data_config(folder / "shards"), (given.rounds, given.seconds)
    about = f"JPEGs of {width} x {height} to uint8"
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with closing(IndependentDecoders(cfg)) as decoders:
        if "workers" in given.tables:
            yield [f"## Workers of foveal's loader, {about}", "", *worker_table(cfg, decoders, *limits)]
        if "launches" in given.tables:
            lines = launch_table(cfg, decoders, *limits, device)
            yield [f"## What the loader costs the thread that trains, {about}", "", *lines]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the tables are written, as markdown, each when it is there")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120.0, help="a table's rounds end then, after 3 at least")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="of the tables of images")
    parser.add_argument("--outputs", nargs="+", choices=OUTPUTS, default=OUTPUTS)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON", help="of a contender")
    given = parser.parse_args()
    given.pythons = dict(pair.rsplit("=", 1) for pair in given.python)
    return given


def described_run(given: argparse.Namespace, packages: set[str]) -> list[str]:
    """The lines above the tables: how they came about."""
    about = (
        f"`python benchmarks/data.py`, up to {given.rounds} rounds in which all take turns, batches of {BATCH}; the load "
        f"average was {os.getloadavg()[1]:.0f} at the end. Images: random crop of 20 to 100 % of the area to 224 x 224 "
        f"(bicubic, antialiased), flip; JPEGs of quality {QUALITY} from the page cache; `float` is normalised on the CPU. "
        "Medians (lowest-highest); a ratio is the median over the rounds. A contender is a process of its own: on 1 core "
        "everything is bound to that core; on more, DALI has that many threads and the others that many worker processes."
    )
    machine = f"Machine: {described(['torch', 'Pillow', 'simplejpeg'])}."
    return ["# From tars to batches", "", about, "", f"{machine} Measured: {', '.join(sorted(packages)) or 'foveal'}."]


def main() -> None:
    given = arguments()
    packages: set[str] = set()
    parts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="foveal-benchmark-") as name:
        for lines in tables(Path(name), given, packages):
            print("\n".join(["", *lines]), flush=True)
            parts += ["", *lines]
            if given.out:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text("\n".join([*described_run(given, packages), *parts, ""]))


if __name__ == "__main__":
    main()
