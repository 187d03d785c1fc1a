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

from processes import children, wait_for_end_of

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
    victims = {"trainer": [trainer.pid], "server": children(trainer.pid)}
    victims["worker"] = children(victims["server"][0])
    assert (len(victims["server"]), len(victims["worker"])) == (1, 2)
    time.sleep(choice.random() * 0.3)
    os.kill(choice.choice(victims[kind]), signal.SIGKILL)
    _, errors = trainer.communicate(timeout=_END_SECONDS)
    if kind == "trainer":
        assert trainer.returncode == -signal.SIGKILL
    else:
        assert "WorkerLostError: a process of the loader (worker " in errors, errors
        assert "was killed by SIGKILL while it was" in errors or kind == "server", errors
    wait_for_end_of(_MARK, mark, _END_SECONDS)
    assert set(_SHARED_MEMORY.iterdir()) <= files


if __name__ == "__main__":
    random_choice = random.Random(0)
    for number in range(int(sys.argv[2])):
        killed = random_choice.choice(["trainer", "server", "worker"])
        kill_one(Path(sys.argv[1]), killed, random_choice)
        print(number, killed, flush=True)  # noqa: T201
