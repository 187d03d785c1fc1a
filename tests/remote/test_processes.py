"""Processes of one node that share a cache: each shard comes once, and the dead block nobody."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxy import Proxy

from foveal.data.config import DataConfig

Configure = Callable[..., DataConfig]
Start = Callable[[DataConfig], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that waits for a line before it reads; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def begin(cfg: DataConfig) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("read_all.py")), json.dumps(cfg.to_dict())]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "open\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def parts(cfg: DataConfig) -> list[Path]:
    return list(Path(str(cfg.cache.dir)).glob("*.part"))


@pytest.fixture
def expected(digits: Path, configure: Configure, start: Start) -> str:
    process = start(configure(str(digits)))
    return process.communicate("go\n")[0].split()[-1]


@pytest.mark.thorough
def test_two_processes_and_one_that_is_killed(expected: str, http: Proxy, configure: Configure, start: Start) -> None:
    url = f"http://127.0.0.1:{http.port}/digits"
    cfg = configure(url, stall_timeout_seconds=240.0)

    # One is killed when a shard has half come; another waits for that shard meanwhile, and takes over.
    killed, waiting = start(cfg), start(cfg)
    http.inject("stall", about="GET /digits/train-000002.tar HTTP", skip=2)
    go(killed)
    until = time.monotonic() + 120
    while http.faults_left():
        assert time.monotonic() < until
        time.sleep(0.05)
    (part,) = parts(cfg)
    assert part.name.endswith("-train-000002.tar.part") and part.stat().st_blocks
    go(waiting)
    time.sleep(0.5)
    assert waiting.poll() is None
    killed.kill()
    assert waiting.communicate(timeout=120)[0].split() == [expected]
    assert parts(cfg) == []
    assert [http.gets(f"train-00000{n}.tar HTTP") for n in range(6)] == [6, 6, 3 + 6, 5, 5, 5]

    # Two at the same time, into an empty cache, over a slow line: each shard and each index comes once.
    for file in Path(str(cfg.cache.dir)).iterdir():
        file.unlink()
    http.heal()
    http.inject("slow", about=".tar HTTP", times=100, after=0, rate=2e6)
    both = [start(cfg), start(cfg)]
    for process in both:
        go(process)
    assert [process.communicate(timeout=120)[0].split() for process in both] == [[expected], [expected]]
    assert [http.gets(f"train-00000{n}.tar HTTP") for n in range(6)] == [6, 6, 6, 5, 5, 5]
    assert [http.gets(f"train-00000{n}.tar.index HTTP") for n in range(6)] == [1] * 6
