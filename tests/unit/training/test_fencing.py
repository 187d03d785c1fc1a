"""Two live attempts at one run: readers follow the newer one, whatever the older one still writes."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import CONTEXT, stop
from stores import ALONE, Tensors, name, names, saved, state

from foveal.checkpoint.config import CheckpointConfig
from foveal.checkpoint.store import CheckpointStore
from foveal.errors import AttemptSupersededError
from foveal.training.lease import Lease, acquire_lease, read_relevant_start_steps
from foveal.training.lease_holder import current_holder

WAIT = 60  # seconds until a process answers on a busy machine
BEAT, PATIENCE = 0.05, 3.0


def start_attempt(run: Path, host: str) -> tuple[Lease, CheckpointStore]:
    """Start an attempt as rank 0 does."""
    holder = replace(current_holder(1), host=host)
    lease = acquire_lease(
        run,
        holder,
        max_attempts_without_progress=9,
        heartbeat_interval_seconds=BEAT,
        heartbeat_timeout_seconds=PATIENCE,
    )
    store = CheckpointStore(
        run / "checkpoints",
        CheckpointConfig(keep=9),
        ALONE,
        lease.number,
        lease.start_steps_by_attempt,
    )
    latest = store.find_latest_valid()
    lease.record_start(latest[1].step if latest else 0)
    return lease, store


def _run_older_attempt(pipe: Connection, run: Path, checks_lease: bool) -> None:
    """Save step 10, wait for a message, and save steps 20 and 30.

    ``checks_lease``: whether it looks for later attempts before it publishes.
    """
    lease, store = start_attempt(run, "node1")
    saved(store, 10)
    pipe.send("saved 10")
    assert pipe.poll(WAIT)
    pipe.recv()
    try:
        for step in (20, 30):
            saved(store, step, is_superseded=lease.poll_superseded if checks_lease else lambda: False)
        pipe.send("saved 30")
    except AttemptSupersededError as error:
        pipe.send(str(error))
    deadline = time.monotonic() + WAIT
    while not lease.is_superseded and time.monotonic() < deadline:
        time.sleep(BEAT)
    lease.record_end_and_release("superseded", AttemptSupersededError.exit_code, 30)
    pipe.send(lease.is_superseded)


@pytest.fixture(params=[True, False], ids=["checks", "checked too early"])
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[BaseProcess, Connection, bool]]:
    """Start an attempt on another node that saves step 10 and is then stopped, as by a network cut."""
    pipe, child_pipe = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_run_older_attempt, args=(child_pipe, tmp_path, request.param))
    process.start()
    assert pipe.poll(WAIT)
    assert pipe.recv() == "saved 10"
    assert process.pid is not None
    stop(process.pid)
    yield process, pipe, request.param
    process.kill()
    process.join(WAIT)


def receive(pipe: Connection) -> object:
    assert pipe.poll(WAIT)
    return pipe.recv()


def test_an_attempt_that_comes_back_changes_nothing(frozen, tmp_path: Path) -> None:
    process, pipe, checks_lease = frozen
    lease, store = start_attempt(tmp_path, "node2")
    assert (lease.number, lease.start_steps_by_attempt, store.latest_step) == (2, {1: 0}, 10)
    saved(store, 20)
    os.kill(process.pid, signal.SIGCONT)
    pipe.send("go on")
    root = tmp_path / "checkpoints"
    valid = [name(10), name(20, attempt=2)]
    if checks_lease:
        assert receive(pipe) == f"{root / name(20)} was not published: another attempt has taken over the run"
        assert [folder for folder in names(root) if not folder.startswith(".gone-")] == valid
    else:  # stopped between the check and the rename
        assert receive(pipe) == "saved 30"
        assert names(root) == sorted([*valid, name(20), name(30)])
    assert receive(pipe) is True
    reader, engine = (
        CheckpointStore(root, CheckpointConfig(), ALONE, 3, read_relevant_start_steps(tmp_path)),
        Tensors(0),
    )
    assert reader.find_latest_valid() == (root / name(20, attempt=2), state(20))
    reader.load(root / name(20, attempt=2), engine, state(20))
    assert engine.values() == {20.0}
    lease.record_end_and_release("finished", 0, 20)
    assert not list((tmp_path / "attempts").glob("*.beat"))
