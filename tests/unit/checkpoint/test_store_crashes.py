"""Kills during a save, at every file operation and at random moments: a published checkpoint is never lost or torn."""

import itertools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from forked import CONTEXT
from stores import Tensors, name, saved, state, store

from foveal.checkpoint.saver import CheckpointSaver

WAIT = 120  # seconds for a child
# Events of Python's audit hooks: every call that can change a folder, or that opens a file.
_CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.truncate", "os.link"}
MOMENTS = 30


def _die_at(moment: int, root: Path) -> None:
    """Replace step 10 and publish 20; die before the file operation of this number."""
    checkpoints, calls = store(root, keep=1), itertools.count()
    checkpoints.find_latest_valid()

    def hook(event: str, _arguments: tuple[object, ...]) -> None:
        if event in _CALLS and next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in (10, 20):
        saved(checkpoints, step)


def _save_for_ever(root: Path, notes: Path, attempt: int) -> None:
    """Save at every step and append published steps to ``notes``."""
    checkpoints = store(root, attempt)
    latest = checkpoints.find_latest_valid()
    engine, saver = Tensors(0), CheckpointSaver(checkpoints)
    if latest is not None:
        checkpoints.load(latest[0], engine, latest[1])
    for step in itertools.count(latest[1].step + 1 if latest else 1):
        engine.fill(step)
        if published := saver.save(engine, state(step)):
            with notes.open("a") as stream:
                stream.write(f"{published.step}\n")


def _content(root: Path, attempt: int) -> tuple[int, set[float]]:
    """The newest step, and the values that it loads into an engine."""
    checkpoints, engine = store(root, attempt), Tensors(0)
    latest = checkpoints.find_latest_valid()
    assert latest is not None
    checkpoints.load(latest[0], engine, latest[1])
    checkpoints.directory.wait_for_removal(WAIT)
    return latest[1].step, engine.values()


@pytest.mark.slow
def test_killed_before_any_file_operation_of_a_save(tmp_path: Path) -> None:
    survived, last, before = set(), tmp_path, tmp_path / "before"
    saved(store(before), 10)
    for moment in itertools.count():
        last = shutil.copytree(before, tmp_path / str(moment))
        child = CONTEXT.Process(target=_die_at, args=(moment, last))
        child.start()
        child.join(WAIT)
        step, values = _content(last, attempt=2)
        assert values == {float(step)}, f"killed before operation {moment}"
        assert all(path.name.startswith("step-") for path in last.iterdir())
        survived.add(step)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert survived == {10, 20}
    assert moment > 20, "a save has more operations than that"
    assert [path.name for path in last.iterdir()] == [name(20)]


@pytest.mark.thorough
@pytest.mark.slow
def test_killed_at_random_moments_of_a_loop_of_saves(tmp_path: Path) -> None:
    root, notes, moments = tmp_path / "checkpoints", tmp_path / "published", random.Random(7)
    furthest = 0
    for attempt in range(1, MOMENTS + 1):
        child = CONTEXT.Process(target=_save_for_ever, args=(root, notes, attempt))
        before = notes.stat().st_size if notes.exists() else 0
        child.start()
        deadline = time.monotonic() + WAIT
        while not (notes.exists() and notes.stat().st_size > before) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        child.join(WAIT)
        assert child.exitcode == -signal.SIGKILL
        published = [int(line) for line in notes.read_text().splitlines()]
        step, values = _content(root, attempt + 1)
        assert step >= max(published) > furthest
        assert values == {float(step)}
        furthest = max(published)
