"""Does `foveal plan` foresee the memory of a training step?

    python benchmarks/memory.py --out benchmarks/results/memory.md

Every case is trained for a few steps by its real engine, on images without content, in processes of its own; the most
that was allocated at once is compared with what was foreseen. On a CPU the C library's own high-water mark is read
(glibc, every allocation above 16 KiB is a mapping of its own there), on a GPU torch.cuda.max_memory_allocated.
"""

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from machine import described
from memory_cases import ON_A_CPU, ON_A_GPU, Case

from foveal.data.batch import Batch
from foveal.data.pack import pack_digits
from foveal.distributed.world import World, init_world
from foveal.engines.base import autocast
from foveal.engines.build import build_engine
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

STEPS = 3
_SMALLEST = "16384"  # bytes from which glibc gives an allocation a mapping of its own
_PATIENCE = 600  # seconds for one case
_SIDE = 64  # pixels, of the cases on a CPU
_AT_ONCE = 3  # cases beside each other: a meter counts the bytes of its own process
CASES = ON_A_GPU if torch.cuda.is_available() else ON_A_CPU
# Ranks are forks of a process that has imported everything; a GPU's library that an import begins does not survive a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    []
    if torch.cuda.is_available()
    else ["deepspeed", "accelerate", "pretrain.train", "distill.train", "finetune.train"]
)


def tree_of(case: Case, folder: Path) -> dict[str, Any]:
    """The settings of a case."""
    tree: dict[str, Any] = {
        "epochs": 1,
        "data": {"path": str(folder / "digits"), "channels": 3, "lanes": 8},
        "batch": {"global_size": 64, "max_micro_size": 16},
        "optim": {},
        "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 192, "depth": 6, "heads": 3},
        "decoder": {"width": 96, "depth": 2, "heads": 3},
        "engine": case.engine,
    }
    tree |= case.change
    tree["data"]["image_size"] = case.side
    if case.stage != "pretrain":
        del tree["decoder"]
    if case.stage == "distill":
        smaller = {"width": 128} if case.side == _SIDE else {"name": "vit_small_patch16_224"}
        tree |= {"teacher": str(folder / f"teacher-{case.side}"), "model": tree["model"] | smaller}
    return tree


def forecast_of(case: Case, folder: Path) -> Forecast:
    """What foveal plan says of a case."""
    stage = importlib.import_module(f"{case.stage}.run").STAGE
    cfg = stage.config_class.from_dict(tree_of(case, folder), case.name)
    return Forecast(stage, stage.functions.build_plan(cfg, case.ranks), ClusterSpec(1, case.ranks, 1.0, 1e9))


class CpuMeter:
    """Bytes in mappings of the C library, since the meter was made."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libc.so.6")
        self._library.mallinfo2.restype = _MallInfo
        self._before, self._most_before = self._now(), self._most()

    def peak(self) -> int:
        """The most since; it must have grown beyond what was there before."""
        most = self._most()
        assert most > self._most_before, "what came before was larger: the high-water mark says nothing"
        return most - self._before

    def _now(self) -> int:
        return self._library.mallinfo2().hblkhd

    def _most(self) -> int:
        """Of malloc_stats, which writes to stderr."""
        kept = os.dup(2)
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            self._library.malloc_stats()
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            lines = said.read().decode().splitlines()
        return next(int(line.split("=")[1]) for line in lines if line.startswith("max mmap bytes"))


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


class GpuMeter:
    """torch's own high-water mark."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most since."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


def train(forecast: Forecast, world: World) -> int:
    """Bytes that a few steps allocated at once, on this rank."""
    plan, stage = forecast.plan, forecast.stage
    cfg = plan.cfg
    _warm_up(forecast, world)
    meter = GpuMeter() if world.device.type == "cuda" else CpuMeter()
    parts = stage.functions.build(plan, world.device)
    engine = build_engine(
        parts.model,
        parts.param_groups,
        cfg.optim,
        cfg.engine,
        world,
        microbatch_size=plan.microbatch_size,
        accumulation_steps=plan.accumulation_steps,
    )
    for step in range(STEPS):
        engine.set_lr(1e-4)
        for micro in range(plan.accumulation_steps):
            with engine.microbatch(last=micro == plan.accumulation_steps - 1):
                total, _ = parts.objective(engine.model, _batch(forecast, step).to(world.device))
                engine.backward(total / plan.microbatch_size)
        del total
        engine.step()
        if getattr(cfg, "uses_ema", False):
            engine.update_ema("averaged.", "encoder.", 0.004)
    return meter.peak()


def _warm_up(forecast: Forecast, world: World) -> None:
    """A forward and backward before anything is measured: libraries keep kernels and scratch pads for themselves."""
    parts = forecast.stage.functions.build(forecast.plan, world.device)
    importlib.import_module(forecast.plan.cfg.engine.kind.replace("plain", "torch"))
    model = parts.model.to(world.device)
    with autocast(world.device, forecast.plan.cfg.engine.precision):
        total, _ = parts.objective(model, _batch(forecast, 0).to(world.device))
        total.backward()
    del parts, model, total
    gc.collect()


def _batch(forecast: Forecast, step: int) -> Batch:
    data, rows = forecast.plan.cfg.data, torch.arange(forecast.plan.microbatch_size)
    images = torch.zeros(len(rows), data.channels, *data.image_hw, dtype=torch.uint8)
    return Batch(images, rows % 10, rows, rows, rows >= 0, step, 0, 0)


def measured(case: Case, folder: Path) -> int:
    """The highest peak of a case's ranks, each a process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    answers, ranks = [], []
    for rank in range(case.ranks):
        here, there = _CONTEXT.Pipe(duplex=False)
        place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(_CONTEXT.Process(target=be_a_rank, args=(CASES.index(case), folder, place, there), daemon=True))
        ranks[-1].start()
        there.close()
        answers.append(here)
    peaks = []
    for answer in answers:
        assert answer.poll(_PATIENCE), f"{case}: no answer within {_PATIENCE} s"
        peaks.append(answer.recv())  # EOFError: the rank has ended, and said why
    for rank in ranks:
        rank.join()
    return max(peaks)


def be_a_rank(number: int, folder: Path, place: dict[str, str], answer: Connection) -> None:
    """Train a case as one of its ranks, and send the peak."""
    os.environ |= place
    torch.set_num_threads(1)
    with init_world(_PATIENCE / 2) as world:
        answer.send(train(forecast_of(CASES[number], folder), world))
        answer.close()
        os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order


def prepare(folder: Path) -> None:
    """Digits to plan with, and teachers."""
    pack_digits(folder / "digits")
    small = VitConfig(name="vit_tiny_patch16_224", patch=8, width=192, depth=3, heads=3)
    for side, teacher in ((_SIDE, small), (224, VitConfig(name="vit_base_patch16_224"))):
        encoder = build_encoder(teacher, image_size=side, channels=3)
        card = Card("pretrain", encoder_card(teacher, side, 3), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        write_export(folder / f"teacher-{side}", dict(encoder.state_dict()), card)


def table(rows: list[tuple[Case, float, float]]) -> list[str]:
    """The cases, and how far the foreseen is off."""
    lines = ["| case | ranks | engine | foreseen, MB | measured, MB | ratio |", "|---|--:|---|--:|--:|--:|"]
    for case, foreseen, peak in rows:
        engine = case.engine["kind"] + (f" ZeRO {case.engine['zero']}" if "zero" in case.engine else "")
        further = [str(case.engine[name]) for name in ("sharding", "precision") if name in case.engine]
        further += ["recompute"] if case.engine.get("activation_checkpointing") else []
        lines.append(
            f"| {case.name} | {case.ranks} | {', '.join([engine, *further])} | {foreseen / 1e6:.1f} | {peak / 1e6:.1f} | "
            f"{foreseen / peak:.3f} |"
        )
    return lines


def report(rows: list[tuple[Case, float, float]]) -> str:
    """The whole file."""
    new, seen = ([row for row in rows if row[0].seen is looked_at] for looked_at in (False, True))
    off = [abs(foreseen / peak - 1) for _, foreseen, peak in new]
    return "\n".join(
        [
            "# Memory: foreseen and measured",
            "",
            "`python benchmarks/memory.py --out FILE`",
            "",
            f"{described(['torch', 'deepspeed', 'accelerate', 'timm'])}.",
            "",
            (
                f"Foreseen is `foveal plan`'s peak of a rank. In the {len(new)} cases below that were not looked at while the model "
                f"of memory was written it is off by {max(off):.1%} at most, {sum(off) / len(off):.1%} on average."
            ),
            "",
            *table(new),
            "",
            *(["Cases that were looked at while it was written:", "", *table(seen), ""] if seen else []),
            (
                "Not in it: what libraries keep for themselves (oneDNN's kernels and scratch pads here, warmed up before; CUDA's "
                "context, cuBLAS's workspaces and NCCL's channels on a GPU), and what the allocator loses to fragmentation. "
                "`foveal plan` adds constants for both, which are assumed."
            ),
            "",
        ]
    )


def main() -> None:
    """Measure all cases, or be one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="cases whose engine and name contain this; nothing is written")
    options = parser.parse_args()
    # Of the server of forks, before its first allocation; the main process keeps what it has.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": _SMALLEST, "MALLOC_MMAP_MAX_": "1000000", "OMP_NUM_THREADS": "1"}
    os.environ["DS_IGNORE_CUDA_DETECTION"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        cases = [case for case in CASES if options.only in f"{case.name} {case.engine}"]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            rows = []
            for case, peak in zip(cases, pool.map(lambda case: measured(case, folder), cases), strict=True):
                rows.append((case, forecast_of(case, folder).memory_estimate.peak, peak))
                print(*table(rows[-1:])[2:], flush=True)
    if options.out and not options.only:
        options.out.write_text(report(rows))


if __name__ == "__main__":
    main()
