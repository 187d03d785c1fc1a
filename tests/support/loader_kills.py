"""Kill a trainer, its server of workers or a worker at random moments, and see what is left.

``python tests/support/loader_kills.py PACKED_DIGITS 50`` kills fifty times.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

_MARK = "FOVEAL_TEST_LOADER"  # in the environment of a trainer and of all that it starts
_END_SECONDS = 20.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only listed
_SCRIPT = Path(__file__).with_name("loader_process.py")


def kill_one(digits: Path, kind: str, choice: random.Random) -> None:
    """Kill a new trainer, its server or one of its workers, a moment after its first batch.

    Asserts that no process and no file in /dev/shm is left, and how the trainer ends if it was not killed itself.
    """
    files, mark = set(_SHARED_MEMORY.iterdir()), uuid.uuid4().hex
    settings = json.dumps({"path": str(digits), "image_size": 8, "channels": 1, "lanes": 8})
    trainer = subprocess.Popen(
        [sys.executable, str(_SCRIPT), settings],
        env={**os.environ, _MARK: mark, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout and trainer.stderr
    assert trainer.stdout.readline() == "batch\n"
    victims = {"trainer": [trainer.pid], "server": _children(trainer.pid)}
    victims["worker"] = _children(victims["server"][0])
    assert (len(victims["server"]), len(victims["worker"])) == (1, 2)
    time.sleep(choice.random() * 0.3)
    os.kill(choice.choice(victims[kind]), signal.SIGKILL)
    _, errors = trainer.communicate(timeout=_END_SECONDS)
    if kind == "trainer":
        assert trainer.returncode == -signal.SIGKILL
    else:
        assert "WorkerLostError: a process of the loader (worker " in errors, errors
        assert "was killed by SIGKILL while it was" in errors or kind == "server", errors
    until = time.monotonic() + _END_SECONDS
    while left := _marked(mark):
        assert time.monotonic() < until, f"{kind} was killed, and these live on: {left}"
        time.sleep(0.05)
    assert set(_SHARED_MEMORY.iterdir()) <= files


def _children(parent: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _marked(mark: str) -> list[int]:
    """The live processes with this mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{_MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


if __name__ == "__main__":
    random_choice = random.Random(0)
    for number in range(int(sys.argv[2])):
        killed = random_choice.choice(["trainer", "server", "worker"])
        kill_one(Path(sys.argv[1]), killed, random_choice)
        print(number, killed, flush=True)  # noqa: T201
