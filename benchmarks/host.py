"""What a step costs the host: operations, device reads and milliseconds, by engine.

    PYTHONPATH=.:tests/support python benchmarks/host.py --out benchmarks/results/host.md

The step is the product's: its loop, objective and engines, with a ViT-B's 12 and 8 blocks and 197 tokens at widths of 24
and 16, so that what remains is the host's work, which a GPU waits for or hides. One process, one thread, no GPU.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from machine import described
from operations import OperationCounter, count_operations, pretraining_steps

from foveal.distributed.world import World, init_world
from foveal.engines.config import EngineConfig
from foveal.training.loop import Step

ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "DDP": {"kind": "accelerate"},
    "FSDP2": {"kind": "accelerate", "sharding": "fsdp2"},
    "ZeRO 1": {"kind": "deepspeed", "zero": 1},
}
_WARM_UP, _STEPS = 4, 30


def measure(engines: dict[str, Iterator[Step]]) -> dict[str, list[float]]:
    """Return milliseconds per step, by engine; the engines take turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(_WARM_UP + _STEPS):
        for name, steps in engines.items():
            start = time.perf_counter()
            next(steps)
            if number >= _WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def build_engines(world: World, extra: dict[str, Any]) -> dict[str, Iterator[Step]]:
    """Return the steps of every engine in fp32 and bf16."""
    return {
        f"{name}, {precision}": pretraining_steps(
            world, EngineConfig.model_validate(engine | extra | {"precision": precision})
        )
        for name, engine in ENGINES.items()
        for precision in ("fp32", "bf16")
    }


def table(counters: dict[str, OperationCounter], times: dict[str, list[float]]) -> list[str]:
    """Return the lines of the table of engines."""
    lines = ["| engine | operations | with views | device reads | ms a step | quartiles |", "|---|---|---|---|---|---|"]
    for name, counter in counters.items():
        low, middle, high = statistics.quantiles(times[name], n=4)
        operations, views = counter.operations.total(), counter.views.total()
        reads = ", ".join(f"{count} x {code}" for code, count in sorted(counter.reads.items())) or "0"
        lines.append(
            f"| {name} | {operations:,} | {operations + views:,} | {reads} | {middle:.1f} | {low:.1f} to {high:.1f} |"
        )
    return lines


def operations_by_name(counter: OperationCounter) -> list[str]:
    """Return the lines of the table of operations, the most frequent first."""
    rows = [f"| {name} | {count} |" for name, count in counter.operations.most_common()]
    return ["| operation | times a step |", "|---|---|", *rows]


def main() -> None:
    """Measure every engine and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of engine")
    given = parser.parse_args()
    extra = dict(pair.split("=") for pair in given.set)
    torch.set_num_threads(1)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with init_world(300) as world:
        engines = build_engines(world, extra)
        times = measure(engines)
        counters = {name: count_operations(steps) for name, steps in engines.items()}
    packages = ("torch", "timm", "deepspeed", "accelerate")
    lines = [
        "# What a step costs the host",
        "",
        (__doc__ or "").partition("\n\n    ")[0],
        "",
        f"    PYTHONPATH=.:tests/support python benchmarks/host.py{' --set ' + ' '.join(given.set) if given.set else ''}",
        "",
        f"{described(packages)}. Median of {_STEPS} steps; the engines took turns.",
        f"The load average was {os.getloadavg()[1]:.0f}: beyond the number of cores, milliseconds compare within the table only.",
        "",
        "Operations are those that torch dispatches below autograd and autocast; a view starts no kernel.",
        "Device reads include those of values that are on the host on every machine: here, nothing is on a GPU.",
        "",
        *table(counters, times),
        "",
        "## Operations of the plain engine in bf16",
        "",
        *operations_by_name(counters["plain, bf16"]),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
