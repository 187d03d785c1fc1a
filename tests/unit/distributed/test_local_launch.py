"""Ranks that foveal starts itself: their places, the exit code of the first failure, Ctrl-C once and twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.distributed import local_launch
from foveal.distributed.launcher import LaunchEnv, candidate_store_addresses, read_launch_env
from foveal.distributed.launcher_process import Process, find_own_launchers
from foveal.distributed.local_launch import rank_environments, run_local_ranks

ROOT = Path(__file__).resolve().parents[3]
# It writes without a buffer: a signal that comes while one is being flushed finds it locked.
RANK = """\
import os, signal, sys, time
def save(*_):
    os.write(1, b"saves\\n")
    time.sleep(float(sys.argv[1]))
    os.write(1, b"saved\\n")
    sys.exit(0)
signal.signal(signal.SIGINT, save)
os.write(1, b"trains\\n")
time.sleep(600)
"""


def test_a_rank_knows_its_place_and_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")  # of an earlier launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    addresses = []
    for rank, environment in enumerate(rank_environments(2)):
        with monkeypatch.context() as patched:
            for name in set(os.environ) - set(environment):
                patched.delenv(name)
            for name, value in environment.items():
                patched.setenv(name, value)
            assert read_launch_env() == LaunchEnv(rank, 2, rank, "foveal")
            assert find_own_launchers() == [Process.from_pid(os.getpid())]
            addresses.append(candidate_store_addresses(read_launch_env()))
    assert addresses[0] == addresses[1]
    assert {host for host, _ in addresses[0]} == {"127.0.0.1"}
    (alone,) = rank_environments(1)
    assert "RANK" not in alone


def test_the_first_failure_is_the_exit_code_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_launch, "_SECONDS_UNTIL_TERM", 0.1)
    code = "import os, sys, time; sys.exit(2) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert run_local_ranks(["-c", code], 2) == 2
    assert run_local_ranks(["-c", "import os; os.kill(os.getpid(), 9)"], 1) == 128 + 9
    assert run_local_ranks(["-c", "pass"], 2) == 0


@pytest.mark.parametrize(("times", "save_seconds", "said"), [(1, 0.3, "saved\nsaved\n"), (2, 600, "")])
def test_ctrl_c_reaches_the_ranks_and_twice_ends_all(times: int, save_seconds: float, said: str) -> None:
    words = ["-c", RANK, str(save_seconds)]
    code = f"import sys; from foveal.distributed.local_launch import run_local_ranks as run; sys.exit(run({words}, 2))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None and launcher.stderr is not None
        assert [launcher.stdout.readline(), launcher.stdout.readline()] == ["trains\n"] * 2
        launcher.send_signal(signal.SIGINT)
        assert [launcher.stdout.readline(), launcher.stdout.readline()] == ["saves\n"] * 2
        if times == 2:
            launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, out) == (130, said)
    assert err == ("foveal: a second Ctrl-C ends the run at once, without saving\n" if times == 2 else "")
