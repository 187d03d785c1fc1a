"""What the agreement of a step costs the ranks of one machine, before and after agreements left the device's group.

    python benchmarks/agreement.py --out benchmarks/results/agreement.md

Before: integers on the device, reduced by the default process group, and read, twice a step. After: ``World.run_all``
with a batch's weight and three flags, a tree of gloo groups, once a step. Both alternate in the same processes. On a CPU the default group is gloo's too: what the first costs
there is its own time; under NCCL it also waits for all that the device has queued, which a CPU cannot show.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from machine import described

from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.tcp_store import open_extra_store_connection
from foveal.distributed.world import World, init_world

RANKS = (2, 4, 8)
WARM_UP, ROUNDS = 20, 200
DEEP_GROUP = 3  # ranks per group of the tree with several levels, which a real world has beyond 32 ranks


def reduce_on_device(world: World) -> None:
    """Agree as foveal 0.1 did: on the weight of the microbatches, then on the flags."""
    for _ in range(2):
        maxima = torch.tensor([world.rank, 1], device=world.device)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        maxima.tolist()


def agree_on_step(world: World) -> None:
    """Agree as the loop does."""
    world.run_all(lambda: world.rank, float, lambda: (False, True, False))


def measure_rank(world: World) -> dict[str, list[float]]:
    """Return the seconds of each round by kind of agreement."""
    store = dist.PrefixStore("deep", open_extra_store_connection(60.0, world.store_key))
    deep_tree = HostCollectives.connect(store, world.rank, world.size, 60.0, DEEP_GROUP)
    kinds: dict[str, Callable[[], object]] = {
        "default group": lambda: reduce_on_device(world),
        "tree": lambda: agree_on_step(world),
        f"tree of groups of {DEEP_GROUP}": lambda: deep_tree.all_reduce([float(world.rank), 0.0, 0.0, 1.0, 0.0], sum),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(WARM_UP + ROUNDS):
        for kind, agree in kinds.items():
            start = time.perf_counter()
            agree()
            if number >= WARM_UP:
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def run_rank(rank: int, size: int, port: int, results: Connection) -> None:
    """Measure as one rank; rank 0 sends its seconds."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_world(60.0) as world:
        seconds = measure_rank(world)
        if rank == 0:
            results.send(seconds)


def measure(size: int) -> dict[str, list[float]]:
    """Return rank 0's seconds with so many ranks."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here, there = context.Pipe()
    processes = [context.Process(target=run_rank, args=(rank, size, port, there)) for rank in range(size)]
    for process in processes:
        process.start()
    seconds = here.recv()
    for process in processes:
        process.join()
    return seconds


def table(seconds_by_size: dict[int, dict[str, list[float]]]) -> str:
    """Return a Markdown table: median and least microseconds of an agreement, by ranks and kind."""
    kinds = list(next(iter(seconds_by_size.values())))
    lines = [f"| ranks | {' | '.join(kinds)} | tree / default |", "|--:|" + "--:|" * (len(kinds) + 1)]
    for size, by_kind in seconds_by_size.items():
        cells = [f"{1e6 * statistics.median(by_kind[kind]):.0f} ({1e6 * min(by_kind[kind]):.0f})" for kind in kinds]
        ratios = [after / before for before, after in zip(by_kind[kinds[0]], by_kind[kinds[1]], strict=True)]
        lines.append(f"| {size} | {' | '.join(cells)} | {statistics.median(ratios):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and, with ``--out``, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    explanation = (
        f"Microseconds on rank 0, median and least of {ROUNDS} rounds in which the kinds alternate; the ratio is the "
        "median of the rounds' ratios. All ranks share the machine's cores."
    )
    command = "`python benchmarks/agreement.py --out benchmarks/results/agreement.md`"
    rows = table({size: measure(size) for size in RANKS})
    text = "\n\n".join(["# An agreement of all ranks", command, described(["torch"]), explanation, rows])
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
