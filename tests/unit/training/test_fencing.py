"""Two attempts at one run that both live: whatever the older one still does, readers follow the newer one."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from stores import ALONE, Tensors, name, names, saved, state

from foveal.checkpoint.store import CheckpointConfig, CheckpointStore
from foveal.errors import AttemptSupersededError
from foveal.training.lease import Lease, acquire_lease, describe_this_process, read_start_steps

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "foveal.training.lease", "foveal.checkpoint.store", "stores"])
WAIT = 60  # seconds for an answer on a busy machine
BEAT, PATIENCE = 0.05, 3.0


def begun(run: Path, host: str, *, looks: bool = True) -> tuple[Lease, CheckpointStore]:
    """An attempt as its rank 0 begins it; ``looks``: whether it looks for later ones before it publishes."""
    who = replace(describe_this_process(1, {}), host=host)
    lease = acquire_lease(run, who, max_attempts_without_progress=9, heartbeat_seconds=BEAT, timeout_seconds=PATIENCE)
    superseded = lease.check_superseded if looks else lambda: False
    made = CheckpointStore(
        run / "checkpoints", CheckpointConfig(keep=9), ALONE, lease.number, lease.start_steps, is_superseded=superseded
    )
    found = made.find_latest()
    lease.record_start(found[1].step if found else 0)
    return lease, made


def _older(pipe: Connection, run: Path, looks: bool) -> None:
    """Save step 10, be frozen, and go on as if nothing had happened."""
    lease, made = begun(run, "node1", looks=looks)
    saved(made, 10)
    pipe.send("saved 10")
    assert pipe.poll(WAIT)
    pipe.recv()
    try:
        for step in (20, 30):
            saved(made, step)
        pipe.send("saved 30")
    except AttemptSupersededError as error:
        pipe.send(str(error))
    given_up = time.monotonic() + WAIT
    while not lease.is_superseded and time.monotonic() < given_up:
        time.sleep(BEAT)
    lease.record_end("superseded", AttemptSupersededError.exit_code, 30)
    pipe.send(lease.is_superseded)


@pytest.fixture(params=[True, False], ids=["looks", "looked too early"])
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[BaseProcess, Connection, bool]]:
    """A holder on another node that has saved step 10 and is frozen, as by a network cut."""
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_older, args=(there, tmp_path, request.param))
    process.start()
    assert here.poll(WAIT)
    assert here.recv() == "saved 10"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    yield process, here, request.param
    process.kill()
    process.join(WAIT)


def said(pipe: Connection) -> object:
    assert pipe.poll(WAIT)
    return pipe.recv()


def test_an_attempt_that_comes_back_changes_nothing(frozen, tmp_path: Path) -> None:
    process, pipe, looks = frozen
    lease, made = begun(tmp_path, "node2")
    assert (lease.number, lease.start_steps, made.latest_step) == (2, {1: 0}, 10)
    saved(made, 20)
    os.kill(process.pid, signal.SIGCONT)
    pipe.send("go on")
    root = tmp_path / "checkpoints"
    mine = [name(10), name(20, attempt=2)]
    if looks:
        assert said(pipe) == f"{root / name(20)} was not published: another attempt has taken over the run"
        assert [each for each in names(root) if not each.startswith(".gone-")] == mine
    else:  # frozen between looking and renaming
        assert said(pipe) == "saved 30"
        assert names(root) == sorted([*mine, name(20), name(30)])
    assert said(pipe) is True
    reader, engine = CheckpointStore(root, CheckpointConfig(), ALONE, 3, read_start_steps(tmp_path)), Tensors(0)
    assert reader.find_latest() == (root / name(20, attempt=2), state(20))
    reader.load(root / name(20, attempt=2), engine, state(20))
    assert engine.values() == {20.0}
    lease.record_end("finished", 0, 20)
    assert not list((tmp_path / "attempts").glob("*.beat"))
