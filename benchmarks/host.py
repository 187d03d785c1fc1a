"""What a step costs the host: operations, device reads and milliseconds, by engine.

    PYTHONPATH=.:tests/support python benchmarks/host.py --out benchmarks/results/host.md

The step is the product's: its loop, objective and engines, with a ViT-B's 12 and 8 blocks and 197 tokens at widths of 24
and 16, so that what remains is the host's work, which a GPU waits for or hides. One process, one thread, no GPU: with
one rank nothing is reduced over ranks. --seconds ends the rounds early.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
} | {f"ZeRO {stage}": {"kind": "deepspeed", "zero": stage} for stage in range(4)}
_WARM_UP, _STEPS, _FEWEST_STEPS = 4, 30, 5


@dataclass
class Racer:
    """An engine's steps and their milliseconds.

    ``linear``: torch's function of that name as the engine left it; ZeRO 3 exchanges it for the whole process.
    """

    steps: Iterator[Step]
    linear: Callable[..., Any]
    milliseconds: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Take a step and return its milliseconds."""
        torch.nn.functional.linear = self.linear
        start = time.perf_counter()
        next(self.steps)
        return 1e3 * (time.perf_counter() - start)

    def count(self) -> OperationCounter:
        """Return the counts of a step."""
        torch.nn.functional.linear = self.linear
        return count_operations(self.steps)


def build_racers(world: World, names: Sequence[str], extra: dict[str, Any]) -> dict[str, Racer]:
    """Return engines in fp32 and bf16."""
    original = torch.nn.functional.linear
    racers = {}
    for name in names:
        for precision in ("fp32", "bf16"):
            cfg = EngineConfig.model_validate(ENGINES[name] | extra | {"precision": precision})
            steps = pretraining_steps(world, cfg)
            racers[f"{name}, {precision}"] = Racer(steps, torch.nn.functional.linear)
            torch.nn.functional.linear = original
    return racers


def race(racers: dict[str, Racer], seconds: float) -> int:
    """Time steps of all racers in turns, so that a busy machine slows all alike; return how many of each."""
    for _ in range(_WARM_UP):
        for racer in racers.values():
            racer.step()
    start = time.monotonic()
    for number in range(_STEPS):
        if number >= _FEWEST_STEPS and time.monotonic() - start > seconds:
            return number
        for racer in racers.values():
            racer.milliseconds.append(racer.step())
    return _STEPS


def table(counters: dict[str, OperationCounter], racers: dict[str, Racer]) -> list[str]:
    """Return the lines of the table of engines."""
    lines = ["| engine | operations | with views | device reads | ms a step | quartiles |", "|---|---|---|---|---|---|"]
    for name, counter in counters.items():
        low, middle, high = statistics.quantiles(racers[name].milliseconds, n=4)
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
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=180.0, help="of the timed steps")
    given = parser.parse_args()
    extra = dict(pair.split("=") for pair in given.set)
    torch.set_num_threads(1)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    with init_world(300) as world:
        racers = build_racers(world, given.engines, extra)
        num_steps = race(racers, given.seconds)
        counters = {name: racer.count() for name, racer in racers.items()}
    packages = ("torch", "timm", "deepspeed", "accelerate")
    lines = [
        "# What a step costs the host",
        "",
        (__doc__ or "").partition("\n\n    ")[0],
        "",
        f"    PYTHONPATH=.:tests/support python benchmarks/host.py{' --set ' + ' '.join(given.set) if given.set else ''}",
        "",
        f"{described(packages)}. Median of {num_steps} steps; the engines took turns.",
        f"The load average was {os.getloadavg()[1]:.0f}: beyond the number of cores, milliseconds compare within the table only.",
        "",
        "Operations are those that torch dispatches below autograd and autocast; a view starts no kernel.",
        "Device reads include those of values that are on the host on every machine: here, nothing is on a GPU.",
        "",
        *table(counters, racers),
        "",
        f"## Operations of {given.engines[0]}, bf16",
        "",
        *operations_by_name(counters[f"{given.engines[0]}, bf16"]),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
