"""How mixed are the batches, what does a node download for them, and how long does the plan of a huge set take.

    python benchmarks/order.py --out benchmarks/results/order.md

Nothing is read but a manifest: batches are counted on class-sorted shards (the worst case: a shard holds few classes),
a node's cache is simulated shard by shard, and the huge set is a manifest.json written for the occasion.
"""

import argparse
import collections
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import described

from foveal.data.format.manifest import read_manifest
from foveal.data.sampling.order import SampleOrder, rank_slot_range

BATCH, RANKS, NODE = 4096, 64, 8  # images per step; ranks of the run, and of one of its nodes
HUGE_SHARDS, HUGE_SAMPLES = 200_000, 10_000


@dataclass(frozen=True)
class Shape:
    """A class-sorted set: ``classes`` of ``per_class`` samples, ``shard`` samples to a shard, ``bytes`` to a sample."""

    name: str
    classes: int
    per_class: int
    shard: int
    bytes: int

    @property
    def counts(self) -> np.ndarray:
        full, rest = divmod(self.classes * self.per_class, self.shard)
        return np.array([self.shard] * full + [rest] * (rest > 0))


IMAGENET = Shape("ImageNet-1k", 1000, 1280, 10_000, 110_000)
PACKED = Shape("ImageNet-1k, small shards", 1000, 1280, 1_280, 110_000)
LARGE = Shape("22k classes", 21_841, 650, 10_000, 110_000)
MIXED = (  # shape, lanes, window
    (IMAGENET, 32, 4),
    (IMAGENET, 32, 1),
    (PACKED, 32, 4),
    (PACKED, 256, 4),
    (LARGE, 32, 4),
    (LARGE, 128, 4),
    (LARGE, 256, 4),
    (LARGE, 512, 3),
)


def uniform_classes(shape: Shape, batch: int) -> float:
    """Distinct classes that a batch drawn uniformly without replacement is expected to hold."""
    samples = shape.classes * shape.per_class
    without = [_log_choose(size, batch) for size in (samples - shape.per_class, samples)]
    return shape.classes * (1 - math.exp(without[0] - without[1]))


def _log_choose(among: int, chosen: int) -> float:
    return math.lgamma(among + 1) - math.lgamma(chosen + 1) - math.lgamma(among - chosen + 1)


def distinct_classes(shape: Shape, order: SampleOrder, steps: int) -> np.ndarray:
    """Distinct classes in each of ``steps`` batches, spread over three epochs."""
    chosen = np.linspace(0, 3 * order.steps_per_epoch - 1, steps).astype(int)
    return np.array(
        [len(np.unique(order.assign_slots(int(step), 0, BATCH).subset_positions // shape.per_class)) for step in chosen]
    )


@dataclass(frozen=True)
class Reading:
    """What one node reads in an epoch: the shards of each step, the most in one step, the most with those ahead."""

    touched: list[list[int]]
    live: int
    ahead: int


def node_reading(shape: Shape, order: SampleOrder, node: int) -> Reading:
    """The first epoch of a node; what lies ahead is asked for at every 16th step."""
    first, last = node_slots(order, node)
    ends, touched, ahead = np.cumsum(shape.counts), [], 0
    for step in range(order.steps_per_epoch):
        samples = order.assign_slots(step, first, last).subset_positions
        touched.append(np.unique(np.searchsorted(ends, samples, side="right")).tolist())
        if step % 16 == 0:
            ahead = max(ahead, len(order.upcoming_shards(step, first, last)))
    return Reading(touched, max(len(each) for each in touched), ahead)


def downloaded(shape: Shape, reading: Reading, capacity: float) -> int:
    """Bytes fetched by a node whose cache begins empty and drops the shard not used for longest."""
    cache, total = collections.OrderedDict[int, int](), 0
    held = 0
    for shards in reading.touched:
        for shard in shards:
            if shard not in cache:
                cache[shard] = int(shape.counts[shard]) * shape.bytes
                held += cache[shard]
                total += cache[shard]
            cache.move_to_end(shard)
        while held > capacity:
            held -= cache.popitem(last=False)[1]
    return total


def node_slots(order: SampleOrder, node: int) -> tuple[int, int]:
    """The slots of a node's ranks, which are neighbours."""
    ranks = range(node * NODE, (node + 1) * NODE)
    return rank_slot_range(BATCH, order.num_lanes, ranks[0], RANKS)[0], rank_slot_range(
        BATCH, order.num_lanes, ranks[-1], RANKS
    )[1]


def mixed_table(steps: int, gigabytes: float) -> Iterator[str]:
    """A row for every set, lanes and window: classes over uniform, live shards, bytes over bytes needed."""
    yield (
        "| set | shards | lanes | window | classes in a batch | uniform draw | ratio | lowest batch | shards a node reads "
        f"in a step | with those ahead | GB of them | downloaded / needed | with {gigabytes:g} GB |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for shape, lanes, window in MIXED:
        order = SampleOrder(shape.counts, BATCH, lanes, window, seed=0)
        classes, uniform = distinct_classes(shape, order, steps), uniform_classes(shape, BATCH)
        nodes = [node_reading(shape, order, node) for node in range(RANKS // NODE)]
        live, ahead = max(node.live for node in nodes), max(node.ahead for node in nodes)
        needed = order.steps_per_epoch * BATCH * shape.bytes
        tight, wide = ahead * shape.shard * shape.bytes, gigabytes * 1e9
        ratios = [
            f"{sum(downloaded(shape, node, size) for node in nodes) / needed:.3f}"
            if size >= live * shape.shard * shape.bytes
            else "too small"
            for size in (tight, wide)
        ]
        yield (
            f"| {shape.name} | {len(shape.counts)} x {shape.shard} | {lanes} | {window} | {classes.mean():.0f} "
            f"| {uniform:.0f} | {classes.mean() / uniform:.3f} | {classes.min() / uniform:.3f} | {live} | {ahead} "
            f"| {tight / 1e9:.0f} | {' | '.join(ratios)} |"
        )


def huge_table() -> Iterator[str]:
    """A row for the first, the middle and the last rank of a run, and for a single rank, each in a fresh process."""
    yield "| rank | manifest read | order made | ids of the first batch | together | peak memory | imports | above them |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    with tempfile.TemporaryDirectory() as folder:
        write_huge_manifest(Path(folder))
        for rank, ranks in ((0, RANKS), (RANKS // 2, RANKS), (RANKS - 1, RANKS), (0, 1)):
            command = [sys.executable, __file__, "--plan", folder, str(rank), str(ranks)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            yield (
                f"| {rank} of {ranks} | {found['manifest']:.2f} s | {found['order']:.2f} s | {found['ids']:.2f} s "
                f"| {found['manifest'] + found['order'] + found['ids']:.2f} s | {found['peak']:.0f} MB "
                f"| {found['imports']:.0f} MB | {found['peak'] - found['imports']:.0f} MB |"
            )


def write_huge_manifest(folder: Path) -> None:
    """The manifest of a set that nobody has: 2 billion samples."""
    digest = "0123456789abcdef" * 4
    size = HUGE_SAMPLES * 112_640
    common = f'"samples": {HUGE_SAMPLES}, "bytes": {size}, "sha256": "{digest}", "index": "{digest}"'
    shards = ",\n".join(f'{{"file": "train-{number:06d}.tar", {common}}}' for number in range(HUGE_SHARDS))
    split = f'{{"samples": {HUGE_SHARDS * HUGE_SAMPLES}, "shards": [{shards}]}}'
    head = '"format": 1, "name": "huge", "fields": ["jpg", "cls"], "mean": [0.5], "std": [0.25]'
    (folder / "manifest.json").write_text(f'{{{head}, "splits": {{"train": {split}}}}}')


def plan(folder: Path, rank: int, ranks: int) -> None:
    """What a rank does before its first batch, in a process of its own; prints seconds and megabytes as JSON."""
    imports, clock = peak_megabytes(), [time.perf_counter()]
    shards = read_manifest(folder).splits["train"].shards
    clock.append(time.perf_counter())
    order = SampleOrder(np.array([shard.samples for shard in shards]), BATCH, 32, 4, seed=0)
    clock.append(time.perf_counter())
    samples = order.assign_slots(0, *rank_slot_range(BATCH, order.num_lanes, rank, ranks)).subset_positions
    clock.append(time.perf_counter())
    assert len(np.unique(samples)) == BATCH // ranks
    took = dict(zip(("manifest", "order", "ids"), np.diff(clock).tolist(), strict=True))
    print(json.dumps({**took, "peak": peak_megabytes(), "imports": imports}))


def peak_megabytes() -> float:
    """The most memory this process held so far, in 10^6 bytes. Unlike ru_maxrss it begins at exec, not in the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def report(steps: int, gigabytes: float) -> Iterator[str]:
    """The lines of the results file."""
    yield "# The order of samples"
    yield ""
    yield "`python benchmarks/order.py --out benchmarks/results/order.md`"
    yield ""
    yield described(["numpy", "pydantic", "torch"])
    yield ""
    yield (
        f"Class-sorted shards, batches of {BATCH:,}, {steps} of them spread over three epochs; a run of {RANKS} ranks on "
        f"nodes of {NODE}. Shards ahead are those of the lanes' next windows. Downloaded / needed: the bytes that all "
        f"nodes fetch in an epoch that begins with empty caches, over the bytes of the samples that they consume "
        f"({IMAGENET.bytes // 1000} kB each), with a cache of just the shards read and ahead, and with one of "
        f"{gigabytes:g} GB."
    )
    yield ""
    yield from mixed_table(steps, gigabytes)
    yield ""
    yield (
        f"{HUGE_SHARDS * HUGE_SAMPLES / 1e9:g} billion samples in {HUGE_SHARDS:,} shards, 32 lanes, window 4: from "
        f"`manifest.json` to the sample ids of a rank's first batch, each rank in a fresh process. Imports are torch, which every rank has anyway, and foveal.data."
    )
    yield ""
    yield from huge_table()


def main() -> None:
    """Print the tables, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the tables are written to as well")
    parser.add_argument("--steps", type=int, default=60, help="batches whose classes are counted")
    parser.add_argument("--cache", type=float, default=100, help="gigabytes that a node keeps")
    parser.add_argument("--plan", nargs=3, metavar=("FOLDER", "RANK", "RANKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        plan(Path(options.plan[0]), int(options.plan[1]), int(options.plan[2]))
        return
    lines = []
    for line in report(options.steps, options.cache):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
