"""The death of a launcher is noticed; a shell is no launcher."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foveal.distributed import launcher_process, preemption
from foveal.distributed.launcher_process import LAUNCHER_ENV_VAR, Process, find_own_launchers
from foveal.distributed.local_launch import rank_environments
from foveal.distributed.preemption import LAUNCHER_GONE, handle_stop_signals
from foveal.distributed.world import World

SINGLE = World(0, 1, 0, "none", torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", LAUNCHER_ENV_VAR):
        monkeypatch.delenv(name, raising=False)


def test_a_process_is_known_by_its_start() -> None:
    current = Process.from_pid(os.getpid())
    assert current == Process.from_pid(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = Process.from_pid(child.pid)
        child.kill()
        deadline = time.monotonic() + 60
        while Process.from_pid(child.pid) is not None and time.monotonic() < deadline:  # a zombie counts as ended
            time.sleep(0.01)
        assert process is not None
        assert Process.from_pid(child.pid) is None


def test_only_launchers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_own_launchers() == []
    parent = Process.from_pid(os.getppid())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(launcher_process, "_SHELL", re.compile("nothing"))
    assert find_own_launchers() == [parent]
    monkeypatch.setattr(launcher_process, "_SHELL", re.compile(Path(f"/proc/{os.getppid()}/comm").read_text().strip()))
    assert find_own_launchers() == []


@pytest.mark.parametrize("name", ["bash", "-bash", "sh", "zsh", "fish", "tmux: server", "screen"])
def test_shells(name: str) -> None:
    assert launcher_process._SHELL.fullmatch(name)


def test_a_local_pipeline_names_itself_to_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    name = rank_environments(1)[0][LAUNCHER_ENV_VAR]
    monkeypatch.setenv(LAUNCHER_ENV_VAR, name)
    assert find_own_launchers() == [Process.from_pid(os.getpid())]
    for value in (name + "1", "x:1", "", "999999999:1", "²:1"):  # invalid, or of another machine
        monkeypatch.setenv(LAUNCHER_ENV_VAR, value)
        assert find_own_launchers() == []


def test_the_death_of_a_launcher_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_LAUNCHER_POLL_SECONDS", 0.02)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        monkeypatch.setenv(LAUNCHER_ENV_VAR, str(Process.from_pid(launcher.pid)))
        with handle_stop_signals(SINGLE) as stop:
            time.sleep(0.1)
            assert stop.stop_reason is None
            launcher.kill()
            deadline = time.monotonic() + 60
            while stop.stop_reason is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.stop_reason == LAUNCHER_GONE
