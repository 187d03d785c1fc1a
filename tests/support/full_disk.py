"""A training that saves at every step, on a disk that is full during some of them: what a test runs in a process.

    python full_disk.py FOLDER filler|limit

``filler``: another file takes the room that is left; ``limit``: the process may write no file as large as a checkpoint.
One line of JSON a step: what was saved, and what a reader would find.
"""

import json
import logging
import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.saver import CheckpointSaver
from foveal.checkpoint.state import TrainState
from foveal.checkpoint.store import CheckpointStore
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
STEPS, FULL = range(1, 7), range(3, 5)
LEFT = 500_000  # bytes that a file may still take while the disk is full
OPTIM = OptimConfig(lr_per_256=1e-2)


def engine() -> Engine:
    """About 130,000 weights, 1.6 MB of checkpoint."""
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    groups = parameter_groups(model, OPTIM)
    return build_engine(
        model, groups, OPTIM, EngineConfig(kind="plain"), ALONE, microbatch_size=8, accumulation_steps=1
    )


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", CheckpointConfig(keep=1), ALONE, 1, {})


def trained(training: Engine, step: int) -> float:
    """One step; its loss."""
    training.set_lr(1e-3)
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
    with training.microbatch(last=True):
        loss = (training.model(rows) - rows).pow(2).mean()
        training.backward(loss)
    assert training.step().applied
    return loss.item()


def fill(folder: Path, how: str, *, full: bool) -> None:
    """Take the room away, or give it back."""
    if how == "limit":
        most = LEFT if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    elif full and not (folder / "filler").exists():
        found = os.statvfs(folder)
        with (folder / "filler").open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, found.f_bavail * found.f_frsize - LEFT)
    elif not full:
        (folder / "filler").unlink(missing_ok=True)


def readable(folder: Path, weights: dict[int, torch.Tensor]) -> int:
    """The step that a resume would find, if it is what that step left."""
    reader, fresh = store(folder), engine()
    found = reader.find_latest_valid()
    assert found is not None
    reader.load(found[0], fresh, found[1])
    assert torch.equal(fresh.gather_full_state_dict()["0.weight"], weights[found[1].step])
    return found[1].step


def main(folder: Path, how: str) -> None:
    training, saving = engine(), CheckpointSaver(store(folder))
    weights: dict[int, torch.Tensor] = {}
    for step in STEPS:
        fill(folder, how, full=step in FULL)
        loss = trained(training, step)
        weights[step] = training.gather_full_state_dict()["0.weight"].clone()
        saving.save(training, TrainState(step, 0.0, 1, "plain", {}))
        saved = saving.wait_and_commit()
        left = sorted(each.name for each in (folder / "checkpoints").iterdir())
        row = {"step": step, "loss": loss, "saved": saved and saved.step, "found": readable(folder, weights)}
        sys.stdout.write(json.dumps(row | {"left": left}) + "\n")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main(Path(sys.argv[1]), sys.argv[2])
