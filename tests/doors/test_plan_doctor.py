"""`foveal plan` and `foveal doctor` as users start them: real ranks, one of them slow, stopped, absent or without room."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Forked, ranks_of
from ports import free_port
from processes import PYTHON, Ended, ended

from foveal.distributed.preflight import PreflightTimeouts
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import open_extra_store_connection

_PATIENCE = 150  # seconds until a rank has come
_JOINING = 10  # seconds that ranks wait for one that is never started
_STOPPED, _RUNNING = 0.3, 0.02  # seconds: a rank that gets little of its time, whatever else the machine does


@pytest.fixture
def digits_config(configs: dict[str, Path], tmp_path: Path) -> list[str | Path]:
    return ["doctor", configs["pretrain"], f"run.dir={tmp_path / 'run'}", "--stage", "pretrain"]


class Job:
    """Ranks that a test starts one by one, each on a node of its own name."""

    def __init__(self, size: int, folder: Path) -> None:
        self.port = free_port()
        self._places, self._folder = ranks_of(size, self.port), folder
        self.ranks: dict[int, Forked] = {}

    def start(self, rank: int, *words: str | Path, **replaced: Any) -> psutil.Process:
        """Start a rank; its process. ``replaced``: as of Forked."""
        place = self._places[rank] | {"LOCAL_RANK": "0", "SLURMD_NODENAME": f"node{rank}"}
        self.ranks[rank] = Forked("foveal.cli", words, self._folder, replaced, **place)
        return psutil.Process(self.ranks[rank].process.pid)

    def has_come(self, rank: int) -> int:
        """Wait until a rank is connected to the others; its process."""
        limit = time.monotonic() + _PATIENCE
        process = psutil.Process(self.ranks[rank].process.pid)
        while time.monotonic() < limit:
            family = [process, *process.children(recursive=True)]
            for each in family:
                if any(link.raddr and link.raddr.port == self.port for link in each.net_connections("tcp")):
                    return each.pid
            time.sleep(0.002)
        pytest.fail(f"rank {rank} has not come")

    def has_begun(self, rank: int) -> None:
        """Wait until a rank has said what it is doing."""
        limit = time.monotonic() + _PATIENCE
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", str(self.port))
            store = open_extra_store_connection(
                _PATIENCE, RunIdentity({"launcher": "environment"}, len(self._places), "doctor").store_key
            )
        while not store.check([f"doing/{rank}"]):
            assert time.monotonic() < limit, f"rank {rank} has not begun"
            time.sleep(0.01)

    def ended(self) -> dict[int, Ended]:
        return {rank: started.ended() for rank, started in self.ranks.items()}


@contextlib.contextmanager
def throttled(pid: int) -> Iterator[None]:
    """A process that stands still most of the time, as one on a node that is throttled."""
    over = threading.Event()

    def throttle() -> None:
        while not over.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(_STOPPED)
                os.kill(pid, signal.SIGCONT)
            time.sleep(_RUNNING)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def last_line(done: Ended) -> str:
    return done.out.strip().splitlines()[-1] if done.out.strip() else ""


def test_a_plan_for_a_cluster(configs: dict[str, Path], tmp_path: Path) -> None:
    words = ["plan", configs["pretrain"], "--stage", "pretrain", "--gpus-per-node", "4"]
    done = ended([PYTHON, "-m", "foveal.cli", *words, "--gpu", "h100", "--json"], tmp_path)
    assert done.code == 0, done.err
    tree = json.loads(done.out)
    assert tree["ranks"] == 4
    assert tree["problems"] == []
    refused = Forked("foveal.cli", [*words, "--nodes", "15"], tmp_path).ended()
    assert refused.code == 2
    assert refused.err.startswith("foveal: ") and len(refused.err.strip().splitlines()) == 1


def test_a_node_by_itself_is_fine(digits_config, tmp_path: Path) -> None:
    done = Forked("foveal.cli", digits_config, tmp_path).ended()
    assert done.code == 0, done.out + done.err
    head, line = done.out.splitlines()[:2]
    assert head.startswith("node") and line.endswith("fine")
    assert not list(tmp_path.glob(".foveal-doctor*"))


@pytest.mark.thorough
def test_settings_that_are_wrong_everywhere(digits_config, tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    for rank in range(2):
        job.start(rank, *digits_config, "data.path=/nowhere", "--slowest", "0.05")
    done = job.ended()
    assert [done[rank].code for rank in range(2)] == [2, 2], done[0].out + done[0].err
    assert "data.path: no such folder: /nowhere" in done[0].out
    assert "bad nodes" not in done[0].out


@pytest.mark.thorough
def test_torchrun_finds_two_ranks_fine(digits_config, tmp_path: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "foveal.cli"]
    done = ended([*launcher, *digits_config, "--slowest", "0.05"], tmp_path)
    assert done.code == 0, done.out + done.err
    assert "all-reduce among 2 ranks: correct, " in done.out
    assert len(done.out.splitlines()) == 3  # rank 0 alone speaks


@pytest.mark.thorough
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    with contextlib.suppress(psutil.AccessDenied):
        job.start(0, "doctor").nice(-5)  # other work must not slow it down as well
    job.start(1, "doctor")
    with throttled(job.has_come(1)):
        done = job.ended()
    assert [done[rank].code for rank in range(2)] == [6, 6], done[0].out + done[0].err
    assert last_line(done[0]) == "bad nodes: node1"
    # Which precision is slow, and whether it ends in time, depends on when the stops come.
    assert re.search("node1: rank 1(: multiplying| multiplies (fp32|bf16)) matrices ", done[0].out), done[0].out
    assert "foveal: suspect node node1: " in done[0].err


def test_a_disk_that_takes_nothing_on_one_node(digits_config, tmp_path: Path) -> None:
    job = Job(2, tmp_path)
    job.start(0, *digits_config, "--slowest", "0.05")
    job.start(1, *digits_config, "--slowest", "0.05").rlimit(psutil.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    done = job.ended()
    assert [done[rank].code for rank in range(2)] == [6, 6], done[0].out + done[0].err
    assert last_line(done[0]) == "bad nodes: node1"
    assert f"node1: {tmp_path} is full, or over a quota or limit" in done[0].out


@pytest.mark.thorough
def test_a_small_shared_memory(tmp_path: Path) -> None:
    private = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces need root")
    command = f"mount -t tmpfs -o size=8m none /dev/shm && exec {PYTHON} -m foveal.cli doctor"
    done = ended([*private, command], tmp_path)
    assert done.code == 6, done.out + done.err
    assert "shm has 8 MB free of 8: NCCL would fail" in done.out
    assert last_line(done) == f"bad nodes: {socket.gethostname()}"


def _short_timeouts(_world_size: int) -> PreflightTimeouts:
    """Long enough for the checks of a rank that does what it should, on a busy machine."""
    return PreflightTimeouts(rank_checks=12.0, connection=4.0, all_reduces=2.0)


@pytest.mark.thorough
@pytest.mark.slow
def test_ranks_that_stop_or_never_come_are_named(tmp_path: Path) -> None:
    """Three ranks: one works, one stands still as soon as it has begun, one is never started."""
    job = Job(3, tmp_path)
    for rank in range(2):
        limits = {"foveal.distributed.preflight.PreflightTimeouts.for_world_size": _short_timeouts}
        job.start(rank, "doctor", "--joining", str(_JOINING), **limits)
    pid = job.has_come(1)
    job.has_begun(1)
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = job.ranks[0].ended()
    finally:
        os.kill(pid, signal.SIGKILL)
        job.ranks[1].ended()
    took = time.monotonic() - began
    assert done.code == 6, done.out + done.err
    assert "rank 1 said nothing more after it began " in done.out
    assert f"rank 2 did not come within {_JOINING} s" in done.out
    assert last_line(done) == "bad nodes: node1"
    assert took < _short_timeouts(3).end
