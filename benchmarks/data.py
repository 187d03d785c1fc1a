"""How fast do JPEGs in tars become batches, per core, and how fast do samples' bytes come out of tars?

    FOVEAL_TEST_DATA=... python benchmarks/data.py --out benchmarks/results/data.md \
        --python litdata=VENV/bin/python --python streaming=VENV/bin/python --python "DALI (CPU)=VENV/bin/python"

Every contender of contenders.py has a process of its own, in the Python that is named for it (default: this one), and
they take turns, one pass over the data each, in an order that changes from round to round. What is not installed is
left out with a line. The pictures are street scenes of CamVid; they lie in the page cache.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from contenders import BATCH, CONTENDERS
from machine import described
from PIL import Image
from webdataset.writer import TarWriter

from foveal.data.indexing.index import index_folder

SHARDS = 4
QUALITY = 90
SMALL, SMALL_BYTES = 20_000, 3_000  # samples of the table of bytes, and their size
IMAGES = {(400, 300): 512, (1024, 768): 128}
OUTPUTS = ("uint8", "float")
REFERENCE, BYTES_REFERENCE = "webdataset + PIL", "webdataset: bytes"


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


def raced(
    names: list[str], pythons: dict[str, str], folder: Path, output: str, cores: int, rounds: int
) -> list[Contender]:
    """``rounds`` rounds in which all take turns."""
    runners = started(names, pythons, folder, output, cores)
    for number in range(rounds):
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


def photographs() -> list[Image.Image]:
    """The street scenes of CamVid's training shard, 480 x 360."""
    if "FOVEAL_TEST_DATA" not in os.environ:
        sys.exit("set FOVEAL_TEST_DATA to the folder that holds camvid/train-000000.tar")
    with tarfile.open(Path(os.environ["FOVEAL_TEST_DATA"]) / "camvid" / "train-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        return [Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in members]  # pyright: ignore[reportOptionalMemberAccess]


def write_photographs(folder: Path, width: int, height: int, count: int) -> float:
    """Shards and a class folder of JPEGs, indexed; their mean size in bytes. Large ones show four scenes."""
    scenes = itertools.cycle(photographs())
    (folder / "files" / "street").mkdir(parents=True)
    samples, across = [], 2 if width > 480 else 1
    for number in range(count):
        sheet = Image.new("RGB", (480 * across, 360 * across))
        for place in range(across**2):
            sheet.paste(next(scenes), (480 * (place % across), 360 * (place // across)))
        stream = io.BytesIO()
        sheet.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=QUALITY)
        samples.append(stream.getvalue())
        (folder / "files" / "street" / f"{number:06d}.jpg").write_bytes(samples[-1])
    write_shards(folder / "shards", "jpg", samples)
    return statistics.mean(map(len, samples))


def write_shards(folder: Path, kind: str, samples: list[bytes]) -> None:
    """Tars of equal length with manifest and index."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(np.array_split(np.arange(len(samples)), SHARDS)):
        with (folder / f"train-{number:06d}.tar").open("wb") as stream, TarWriter(stream, encoder=False) as tar:
            for row in rows:
                tar.write({"__key__": f"{row:08d}", kind: samples[row], "cls": b"0"})
    index_folder(str(folder), classes=("street",))


def byte_table(place: Path, given: argparse.Namespace) -> list[str]:
    """The table of samples' bytes."""
    names = [name for name in given.only if "bytes" in name]
    if not names:
        return []
    noise = np.random.default_rng(0)
    write_shards(place / "small" / "shards", "png", [noise.bytes(SMALL_BYTES) for _ in range(SMALL)])
    runners = raced(names, given.pythons, place / "small", "bytes", 1, given.rounds)
    heading = f"## Bytes of samples ({SMALL:,} of {SMALL_BYTES:,} bytes) out of tars, on 1 core"
    return ["", heading, "", *table(runners, BYTES_REFERENCE, "samples", 1)]


def image_tables(place: Path, given: argparse.Namespace, packages: set[str]) -> Iterator[list[str]]:
    """A table for every size, output and number of cores."""
    names = [name for name in given.only if "bytes" not in name]
    for (width, height), count in IMAGES.items():
        folder = place / f"{width}x{height}"
        size = write_photographs(folder, width, height, count)
        for cores, output in itertools.product(given.cores, given.outputs):
            runners = raced(names, given.pythons, folder, output, cores, given.rounds)
            packages.update(runner.package for runner in runners)
            heading = f"## JPEGs of {width} x {height} ({size / 1000:.0f} kB) to {output}, on {cores} core"
            yield ["", heading + "s" * (cores > 1), "", *table(runners, REFERENCE, "images", cores)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the tables are written, as markdown")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--outputs", nargs="+", choices=OUTPUTS, default=OUTPUTS)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="these contenders")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PYTHON", help="of a contender")
    given = parser.parse_args()
    given.pythons = dict(pair.rsplit("=", 1) for pair in given.python)
    return given


def main() -> None:
    given = arguments()
    packages: set[str] = set()
    parts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="foveal-benchmark-") as name:
        tables = image_tables(Path(name), given, packages)
        for lines in itertools.chain([byte_table(Path(name), given)], tables):
            print("\n".join(lines), flush=True)
            parts += lines
    about = (
        f"`python benchmarks/data.py`, {given.rounds} rounds in which all take turns, each a process of its own, batches of "
        f"{BATCH}. Images: random crop of 20 to 100 % of the area to 224 x 224 (bicubic, antialiased), flip; JPEGs of "
        f"quality {QUALITY} from the page cache; `float` is normalised on the CPU. Medians (lowest-highest); a ratio is the "
        "median over the rounds. On 1 core everything is bound to that core; on more, DALI has that many threads "
        "and the others that many worker processes."
    )
    machine = f"Machine: {described(['torch', 'Pillow', 'simplejpeg'])}. Measured: {', '.join(sorted(packages))}."
    text = "\n".join(["# From tars to batches", "", about, "", machine, *parts, ""])
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main()
