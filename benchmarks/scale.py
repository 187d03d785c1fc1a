"""What a start, a save and a resume cost on many ranks: a rehearsal with fake ranks that train nothing.

    python benchmarks/scale.py --out benchmarks/results/scale.md

Rank 0 is a process that serves the ranks' real store; all other ranks are threads of a second process with connections
of their own. They join, send heartbeats, compare them, and exchange a preflight's reports. Collectives are shared
memory here, because NCCL and gloo are not what is rehearsed: files are. All ranks save and resume one real checkpoint
with as many files as ranks, sharded as under ZeRO 3, and two nodes open a set of 10,000 shards.
"""

import argparse
import contextlib
import json
import os
import pickle
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import described
from scale_ranks import COMPARING, GPUS_PER_NODE, TIMEOUT, rehearse_store, serve

from foveal.checkpoint.chunks import TensorChunk, replicated_chunk
from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import Manifest, Shard, Split, write_manifest
from foveal.data.storage.listing import list_files_if

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from thread_ranks import FileOperations, ThreadWorld, run_ranks

SHARDS, TENSORS, SIZE = 10_000, 152, 4096  # as many tensors as a ViT-B has, with few elements
PARTS = ("weight", "exp_avg", "exp_avg_sq")


class ShardedState:
    """An engine's state under ZeRO 3: each rank has a part of every tensor, and all have one frozen tensor."""

    num_updates = 1

    def __init__(self, rank: int, size: int, value: float) -> None:
        start, stop = SIZE * rank // size, SIZE * (rank + 1) // size
        self.chunks = [
            TensorChunk(
                f"encoder.blocks.{number}.weight",
                (SIZE,),
                start,
                {part: torch.full((stop - start,), value) for part in PARTS},
                (0, stop - start),
            )
            for number in range(TENSORS)
        ]
        self.chunks.append(replicated_chunk("frozen", {"weight": torch.full((SIZE,), value)}, rank, size))

    def state_chunks(self) -> list[TensorChunk]:
        return self.chunks

    def on_state_loaded(self, num_updates: int) -> None:
        assert num_updates == 1
        assert all(float(value.min()) == 7.0 for chunk in self.chunks for value in chunk.flat_views_by_part.values())


@contextlib.contextmanager
def counted(root: Path, found: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Count the file operations and the seconds of a phase."""
    with pytest.MonkeyPatch.context() as patch:
        operations, began = FileOperations(root, patch), time.monotonic()
        yield
        found[name] = {"seconds": time.monotonic() - began, **operations.pop()}


def rehearse_checkpoint(size: int, root: Path) -> dict[str, dict[str, float]]:
    """The second save of an attempt and a resume: seconds, file operations, and bytes that ranks send each other."""
    found: dict[str, dict[str, float]] = {}
    received: list[int] = []  # bytes that rank 0 gets of the others, or all get of rank 0

    def measured(world: ThreadWorld) -> ThreadWorld:
        gather = world.all_gather_objects

        def gather_and_count(value: Any) -> list[Any]:
            values = gather(value)
            received.extend(len(pickle.dumps(each)) for each in values)
            return values

        def broadcast_and_count(value: Any) -> Any:
            received.append(len(pickle.dumps(value)))
            return gather(value)[0]

        if world.rank == 0:
            world.__dict__ |= {"all_gather_objects": gather_and_count, "broadcast_object": broadcast_and_count}
        return world

    def save(world: ThreadWorld, savers: list[CheckpointSaver], step: int) -> None:
        engine = ShardedState(world.rank, size, 7.0)
        savers[world.rank].save(engine, TrainState(step, 0.0, size, "deepspeed ZeRO 3", {}))
        savers[world.rank].wait_and_commit()

    def resume(world: ThreadWorld) -> None:
        store = CheckpointStore(root, CheckpointConfig(), world, 2, {1: 0})
        latest = store.find_latest_valid()
        assert latest is not None
        store.load(latest[0], ShardedState(world.rank, size, 0.0), latest[1])

    stores = run_ranks(size, lambda world: CheckpointStore(root, CheckpointConfig(), world, 1, {}))
    savers = [CheckpointSaver(store) for store in stores]
    run_ranks(size, lambda world: save(world, savers, 1))
    for world_store in stores:
        measured(world_store.world)  # the ranks of the first save go on
    with counted(root, found, "save"):
        run_ranks(size, lambda world: save(world, savers, 2))
    found["save"]["received"] = sum(received)
    received.clear()
    with counted(root, found, "resume"):
        run_ranks(size, lambda world: resume(measured(world)))
    found["resume"]["received"] = sum(received)
    return found


def write_shards(folder: Path) -> None:
    """A set of shards as far as opening it looks: a manifest, and files of the right names and sizes."""
    shards = tuple(Shard(f"train-{number:06d}.tar", 1, 1024, index="0" * 64) for number in range(SHARDS))
    write_manifest(
        Manifest(
            name="rehearsal",
            fields=("jpg",),
            mean=(0.5,),
            std=(0.5,),
            splits={"train": Split(samples=SHARDS, shards=shards)},
        ),
        folder,
    )
    for shard in shards:
        (folder / shard.file).write_bytes(bytes(shard.bytes))
        (folder / f"{shard.file}.index").write_bytes(b"")


def rehearse_data(size: int, root: Path) -> dict[str, dict[str, float]]:
    """Two nodes open the set; the other nodes would do the same at the same time."""
    found: dict[str, dict[str, float]] = {}
    cfg = DataConfig.from_dict({"path": str(root), "image_size": 8}, "the rehearsal")
    nodes = min(2, size // GPUS_PER_NODE)

    def open_set(local_rank: int) -> None:
        with list_files_if(local_rank == 0):
            assert Dataset.open(cfg).num_samples("train") == SHARDS

    with counted(root, found, "open"):
        began = time.monotonic()
        for number in range(nodes * GPUS_PER_NODE):
            open_set(number % GPUS_PER_NODE)
        seconds = (time.monotonic() - began) / nodes / GPUS_PER_NODE
    found["open"]["stat"] += 2 * SHARDS * found["open"]["list"]  # of the listing's entries, which no hook sees
    counts = {kind: count * size / nodes / GPUS_PER_NODE for kind, count in found["open"].items()}
    return {"open": {**counts, "seconds": seconds}}


def work(size: int, place: Path) -> dict[str, dict[str, float]]:
    """All phases for a number of ranks."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    threading.stack_size(1 << 20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    with tempfile.TemporaryDirectory(prefix="foveal-scale-", dir=place) as name:
        folders = [Path(name) / part for part in ("data", "checkpoints")]
        for folder in folders:
            folder.mkdir()
        write_shards(folders[0])
        found = rehearse_data(size, folders[0])
        shutil.rmtree(folders[0])
        found |= rehearse_checkpoint(size, folders[1])
        found |= rehearse_store(size)
    return found


NOTES = (
    (
        "Four times the ranks cost four times the file operations of a save and a resume. Without the index, on 32 ranks, a "
        "resume opened 1,111 files and made 1,155 stats, with it 58 and 3 (tests/unit/checkpoint/test_chunk_index.py counts "
        "them). Of the opens of a resume 16 a rank are of the replicated tensor, which at most 16 ranks write."
    ),
    (
        "Stats of the data are those of one rank a node. Labels are not in this table: every rank reads every shard's index "
        "for them, and `foveal plan` says so from a million reads on."
    ),
    "Rank 0 holds three connections a rank. What it receives in a preflight are mostly polls of ranks that wait.",
    "Heartbeats of all ranks are two requests of each of the ranks that compare them.",
)
COLUMNS = ("seconds", "descriptors", "sent", "received", "open", "stat", "list")
TITLES = {
    "open": "open a set of 10,000 shards",
    "save": "save a checkpoint",
    "resume": "find, verify and load it",
}


def table(results: dict[int, dict[str, dict[str, float]]]) -> list[str]:
    """A row for each phase and number of ranks."""
    lines = [
        "| phase | ranks | seconds | descriptors of rank 0 | sent by rank 0, MB | received, MB | opens | stats | listings |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for phase in next(iter(results.values())):
        for size, found in results.items():
            cells = []
            for column in COLUMNS:
                value = found[phase].get(column)
                scale, digits = (1e6, 2) if column in ("sent", "received") else (1, 1 if column == "seconds" else 0)
                cells.append("" if value is None else f"{value / scale:,.{digits}f}")
            lines.append(f"| {TITLES.get(phase, phase)} | {size:,} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table is written, as markdown")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()), help="a folder for the files")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    if given.work:
        sys.stdout.write(json.dumps(work(given.work, given.place)))
        sys.stdout.flush()
        os._exit(0)  # threads of heartbeats, whose store is gone
    results = {}
    for size in given.ranks:
        command = [sys.executable, __file__, "--work", str(size), "--place", str(given.place)]
        quiet = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}  # a line for each connection whose host has no name
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=4 * TIMEOUT, env=quiet)
        results[size] = json.loads(done.stdout)
    about = (
        f"`python benchmarks/scale.py`: rank 0 in a process that serves the ranks' store, the other ranks threads of a "
        f"second process. They join, exchange a preflight's reports, send heartbeats once a second, and {COMPARING} of "
        f"them compare all heartbeats (three polls of a second included). A checkpoint has a file of each rank: "
        f"{TENSORS} sharded tensors with two moments and a replicated one. {SHARDS:,} shards are opened by two nodes of "
        f"{GPUS_PER_NODE} ranks; seconds are of one rank, counts of all nodes. Received of a save and a resume: by each rank, in "
        f"collectives. Seconds are of threads that share a Python interpreter, not of a cluster."
    )
    machine = f"Machine: {described(['torch'])}. Its load was {os.getloadavg()[2]:.0f} over the last 15 minutes."
    text = "\n".join(
        [
            "# A start on many ranks, rehearsed without GPUs",
            "",
            about,
            "",
            machine,
            "",
            *table(results),
            "",
            *(f"- {note}" for note in NOTES),
            "",
        ]
    )
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
