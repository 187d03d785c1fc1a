"""How far does a sum of gradients over ranks move them? And what does a rank send for it?

    PYTHONPATH=.:tests/support python benchmarks/reduction.py --out benchmarks/results/reduction.md

Masked autoencoding of the digits in bf16: 64 images a step in 8 microbatches of 8, which are the same on 1, 2, 4 and 8
ranks, so that nothing differs but the sum. The gradient is AdamW's first moment after the first step. Ranks are
processes of one machine that sum over gloo.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from collectives import collectives_of_a_step
from engines import Shape, Tiny, gathered
from machine import described
from ranks import stage_named

from foveal.data.pack import pack_digits
from foveal.distributed.world import World, init_world
from foveal.engines.deepspeed import import_deepspeed
from foveal.training.launch import run_stage

RANKS = (2, 4, 8)
_PATIENCE = 300  # seconds for one collective
ENGINES: dict[str, dict[str, Any]] = {
    **{
        f"ZeRO {zero}, {dtype}": {"kind": "deepspeed", "zero": zero, "reduce_dtype": dtype}
        for zero in (0, 1, 2, 3)
        for dtype in (("autocast", "fp32") if zero else ("fp32",))
    },
    "DDP": {"kind": "accelerate"},
    "FSDP2": {"kind": "accelerate", "sharding": "fsdp2"},
}


def train(world: World, folder: Path, name: str, engine: dict[str, Any]) -> None:
    """One step, whose gradient rank 0 leaves in the folder."""
    run = folder / f"{name}, {world.size}"
    tree = {
        "epochs": 1,
        "seed": 3,
        "data": {"path": str(folder / "digits"), "image_size": 16, "channels": 1, "lanes": 8},
        "batch": {"global_size": 64, "max_micro_size": 8},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 64, "depth": 3, "heads": 2},
        "decoder": {"width": 32, "depth": 1, "heads": 2},
        "optim": {"lr_per_256": 4.0e-3, "warmup_epochs": 0.2},
        "checkpoint": {"every": 0},
        "engine": engine | {"precision": "bf16"},
        "tracking": {"uri": None},
        "run": {"dir": str(run), "stop_at_step": 1},
    }
    stage = stage_named("pretrain")
    run_stage(stage, stage.config_class.from_dict(tree, name), world)
    if world.rank == 0:
        (checkpoint,) = (run / "checkpoints").glob("step-00000001-*")
        moments = {key: value for key, value in gathered(checkpoint).items() if key.startswith("exp_avg ")}
        torch.save(moments, folder / f"{run.name}.pt")
    world.barrier()


def work(rank: int, size: int, port: int, folder: Path) -> None:
    """One rank: every engine in turn; rank 0 leaves what a step sends."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_world(_PATIENCE) as world:
        for name, engine in ENGINES.items() if size > 1 else (("plain", {"kind": "plain"}),):
            train(world, folder, name, engine)
        for name, engine in ENGINES.items() if size == 2 else ():
            seen, _ = collectives_of_a_step(world, Shape(2, precision="bf16", **engine))
            sent: dict[str, int] = {}
            for each in seen:
                what = "summed" if each.is_reduction else "gathered" if "gather" in each.operator else "else"
                key = f"{what} {str(each.dtype).removeprefix('torch.')}"
                sent[key] = sent.get(key, 0) + each.elements * each.dtype.itemsize
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(sent))
    os._exit(0)  # gloo's threads sometimes abort an interpreter that ends in order


def start(size: int, folder: Path) -> None:
    """All ranks of a world, forked after the imports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, size, port, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not any(rank.exitcode for rank in ranks), [rank.exitcode for rank in ranks]


def error(folder: Path, name: str, size: int) -> float:
    """The error of the gradient, relative in the 2-norm."""
    ours, reference = (torch.load(folder / f"{each}.pt") for each in (f"{name}, {size}", "plain, 1"))
    ours, reference = (torch.cat([values[key].flatten() for key in sorted(values)]) for values in (ours, reference))
    return float((ours - reference).norm() / reference.norm())


def report(folder: Path) -> str:
    """The whole file."""
    trained = sum(parameter.numel() for parameter in Tiny().parameters() if parameter.requires_grad)
    lines = [
        "# Sums of gradients over ranks",
        "",
        "`PYTHONPATH=.:tests/support python benchmarks/reduction.py --out FILE`",
        "",
        f"{described(['torch', 'deepspeed', 'accelerate', 'timm'])}.",
        "",
        "bf16 products on the digits, 64 images in 8 microbatches, against plain PyTorch on one rank with the same",
        "microbatches. `autocast` is `engine.reduce_dtype=autocast`, which runs before 0.2 have; `fp32` is the default.",
        "The difference of the first step's gradient, in the 2-norm, relative:",
        "",
        "| engine | " + " | ".join(f"{size} ranks" for size in RANKS) + " |",
        "|---|" + "--:|" * len(RANKS),
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{error(folder, name, size):.1e}" for size in RANKS) + " |" for name in ENGINES
    ]
    lines += [
        "",
        "What a rank puts into the collectives of a step, in bytes per trained parameter, on 2 ranks with 2 microbatches",
        f"(a model of {trained:,} parameters; ZeRO 2, ZeRO 3 sum after every microbatch, FSDP2 after the last):",
        "",
        "| engine | summed in bf16 | summed in fp32 | gathered in bf16 | gathered in fp32 |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in ENGINES:
        sent = json.loads((folder / f"{name}.json").read_text())
        columns = [f"{what} {dtype}" for what in ("summed", "gathered") for dtype in ("bfloat16", "float32")]
        lines.append(f"| {name} | " + " | ".join(f"{sent.get(column, 0) / trained:.2f}" for column in columns) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure on 1, 2, 4 and 8 ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import_deepspeed()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pack_digits(folder / "digits")
        for size in (1, *RANKS):
            start(size, folder)
        text = report(folder)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
