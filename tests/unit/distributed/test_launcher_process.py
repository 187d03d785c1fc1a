"""A launcher that is killed is noticed; a shell that ends is none."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from submit import _environment

from foveal.distributed import launcher_process, preemption
from foveal.distributed.launcher_process import LAUNCHER, Process, launchers
from foveal.distributed.preemption import ORPHANED, listening
from foveal.distributed.world import World

ALONE = World(0, 1, 0, "none", torch.device("cpu"))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", LAUNCHER):
        monkeypatch.delenv(name, raising=False)


def test_a_process_is_known_by_its_start() -> None:
    ours = Process.of(os.getpid())
    assert ours == Process.of(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        there = Process.of(other.pid)
        other.kill()
        deadline = time.monotonic() + 10
        while Process.of(other.pid) is not None and time.monotonic() < deadline:  # a zombie has ended
            time.sleep(0.01)
        assert there is not None
        assert Process.of(other.pid) is None


def test_only_launchers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launchers() == []
    parent = Process.of(os.getppid())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(launcher_process, "_SHELL", re.compile("nothing"))
    assert launchers() == [parent]
    monkeypatch.setattr(launcher_process, "_SHELL", re.compile(Path(f"/proc/{os.getppid()}/comm").read_text().strip()))
    assert launchers() == []


@pytest.mark.parametrize("name", ["bash", "-bash", "sh", "zsh", "fish", "tmux: server", "screen"])
def test_shells(name: str) -> None:
    assert launcher_process._SHELL.fullmatch(name)


def test_a_chain_names_itself_to_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    name = _environment(2)[LAUNCHER]
    monkeypatch.setenv(LAUNCHER, name)
    assert launchers() == [Process.of(os.getpid())]
    for other in (name + "1", "x:1", "", "999999999:1", "²:1"):  # such as what a job was given on another machine
        monkeypatch.setenv(LAUNCHER, other)
        assert launchers() == []


def test_its_end_asks_the_run_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_LOOKS", 0.02)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as chain:
        monkeypatch.setenv(LAUNCHER, str(Process.of(chain.pid)))
        with listening(ALONE) as heard:
            time.sleep(0.1)
            assert heard.heard is None
            chain.kill()
            deadline = time.monotonic() + 10
            while heard.heard is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert heard.heard == ORPHANED
