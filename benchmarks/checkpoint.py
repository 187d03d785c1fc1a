"""How long does training stand still for a checkpoint: foveal's save and DeepSpeed's own, of the same engine?

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint.md

A ViT-B under ZeRO 2 on two ranks (processes under gloo on a CPU), or on all GPUs that there are. In every round both save the same state, in turns,
after a step of training; between two turns everything is forced to disk. foveal writes while training goes on, so the
steps in which it wrote are timed as well.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from machine import described

from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World, init_world
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups

GPUS = torch.cuda.device_count()
MODEL, ZERO, RANKS = "vit_base_patch16_224", 2, GPUS or 2
# Pixels and images of a step: few on a CPU, where as many weights but for the positions are trained in a short step.
SIDE, IMAGES = (224, 32) if GPUS else (96, 1)
GOAL = 0.5
_PATIENCE = 3600  # seconds for all rounds


class Saving:
    """One rank, its engine, and the two ways to save it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        optim = OptimConfig(lr_per_256=1e-3)
        model = timm.create_model(MODEL, pretrained=False, img_size=SIDE)
        cfg = EngineConfig(kind="deepspeed", zero=ZERO)
        self.engine: Any = build_engine(
            model, parameter_groups(model, optim), optim, cfg, world, microbatch_size=IMAGES, accumulation_steps=1
        )
        self.saver = CheckpointSaver(CheckpointStore(folder / "foveal", CheckpointConfig(keep=1), world, 1, {}))
        images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(world.rank))
        self.images = images.to(world.device)

    def train(self) -> float:
        """A step; its seconds on the slowest rank."""
        self.world.barrier()
        began = time.perf_counter()
        self.engine.set_lr(1e-4)
        with self.engine.microbatch(last=True):
            self.engine.backward(self.engine.model(self.images).square().mean())
        self.engine.step()
        return max(self.world.all_gather_objects(time.perf_counter() - began))

    def deepspeed(self, number: int) -> dict[str, Any]:
        """DeepSpeed's own save, which returns when everything is written (and not forced to disk)."""
        self.world.barrier()
        began = time.perf_counter()
        self.engine._engine.save_checkpoint(  # noqa: SLF001 - the peer under the adapter
            str(self.folder / "deepspeed"), tag=str(number)
        )
        stall = max(self.world.all_gather_objects(time.perf_counter() - began))
        tag = self.folder / "deepspeed" / str(number)
        size = sum(file.stat().st_size for file in tag.iterdir())
        self.world.barrier()
        if self.world.rank == 0:
            shutil.rmtree(tag)
        return {"who": "DeepSpeed", "stall": stall, "bytes": size}

    def foveal(self, number: int) -> dict[str, Any]:
        """foveal's, and the steps of training while its threads wrote."""
        self.world.barrier()
        state = TrainState(number, 0.0, RANKS, f"deepspeed ZeRO {ZERO}", {})
        self.saver.save(self.engine, state)
        steps = []
        while self.world.any_rank(self.saver.is_rank_writing):
            steps.append(self.train())
        saved = self.saver.commit()
        assert saved is not None, "the disk is full"
        self.saver.wait_and_commit()
        found = {
            "who": "foveal",
            "stall": saved.stall_seconds,
            "bytes": saved.num_bytes_all_ranks,
            "at once": saved.seconds_without_overlap,
        }
        return found | {"write": saved.write_seconds, "steps": steps}

    def round(self, number: int) -> list[dict[str, Any]]:
        ways = [self.deepspeed, self.foveal]
        answers = []
        for way in ways if number % 2 else ways[::-1]:
            alone = self.train()
            if self.world.rank == 0:
                os.sync()
            answers.append(way(number) | {"alone": alone})
        return answers


def work(folder: Path, rounds: int) -> None:
    """What each rank does; the first round is for the memory that both keep, and is not counted."""
    torch.set_num_threads(1)
    with init_world(600) as world:
        saving = Saving(world, folder)
        saving.train()
        found = [saving.round(number) for number in range(rounds + 1)][1:]
        if world.rank == 0:
            (folder / "found.json").write_text(json.dumps(list(itertools.chain(*found))))


def spread(values: list[float], unit: float = 1000.0, digits: int = 0) -> str:
    """Median, lowest and highest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle * unit:,.{digits}f} ({low * unit:,.{digits}f}-{high * unit:,.{digits}f})"


def table(found: list[dict[str, Any]]) -> list[str]:
    """What was found on one file system."""
    ours, theirs = ([one for one in found if one["who"] == who] for who in ("foveal", "DeepSpeed"))
    ratios = [mine["stall"] / other["stall"] for mine, other in zip(ours, theirs, strict=True)]
    steps, alone = [step for one in ours for step in one["steps"]], [one["alone"] for one in found]
    return [
        "| | training stands still, ms | bytes |",
        "|---|--:|--:|",
        f"| DeepSpeed `save_checkpoint` | {spread([one['stall'] for one in theirs])} | {theirs[0]['bytes'] / 1e6:,.0f} MB |",
        f"| foveal | {spread([one['stall'] for one in ours])} | {ours[0]['bytes'] / 1e6:,.0f} MB |",
        f"| foveal, `checkpoint.async_save=false` | {spread([one['at once'] for one in ours])} | the same |",
        "",
        (
            f"foveal to DeepSpeed, median over the rounds: **{spread(ratios, 1.0, 2)}**; the goal is at most {GOAL}. foveal's "
            f"threads wrote for {spread([one['write'] for one in ours])} ms; a step of training took {spread(steps)} ms "
            f"meanwhile, and {spread(alone)} ms without."
        ),
    ]


def measured(place: Path, rounds: int) -> list[dict[str, Any]]:
    """All rounds on one file system, in processes of their own."""
    with tempfile.TemporaryDirectory(prefix="foveal-benchmark-", dir=place) as name:
        command = ["torchrun", "--standalone", f"--nproc-per-node={RANKS}", __file__, "--work", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--rounds", str(rounds)], check=True, timeout=_PATIENCE, env=environment)
        return json.loads((Path(name) / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the tables are written, as markdown")
    parser.add_argument("--rounds", type=int, default=9)
    places = {"disk": tempfile.gettempdir(), "memory": "/dev/shm"}  # noqa: S108 - the file system is what is measured
    parser.add_argument(
        "--place", action="append", metavar="NAME=FOLDER", help="a file system; default: disk and memory"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.rounds)
        return
    parts = []
    for name, folder in (dict(pair.split("=", 1) for pair in given.place) if given.place else places).items():
        parts += ["", f"## On {name}", "", *table(measured(Path(folder), given.rounds))]
    about = (
        f"`python benchmarks/checkpoint.py --rounds {given.rounds}`: {MODEL} at {SIDE} px in fp32 under ZeRO {ZERO} on "
        f"{RANKS} rank{'s' if RANKS > 1 else ''}, one thread each. {given.rounds} rounds in which both save the same state, in turns. Medians "
        f"(lowest-highest), of the slowest rank. DeepSpeed's returns when its files are written, not when they are on disk; "
        f"foveal's threads force them to disk and hash them. Without overlap, foveal copies, writes and publishes one after "
        f"the other while training waits."
    )
    machine = (
        f"Machine: {described(['torch', 'deepspeed', 'timm'])}. Other processes used it meanwhile: its load was "
        f"{os.getloadavg()[2]:.0f} over the last 15 minutes."
    )
    text = "\n".join(["# What a checkpoint costs", "", about, "", machine, *parts, ""])
    sys.stdout.write(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
