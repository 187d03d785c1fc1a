"""Ranks whose torchrun is killed save and leave: nobody would look at them any more."""

import signal

import psutil
import pytest

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(600)]
_PATIENCE = 150  # seconds, on a busy machine


def test_ranks_without_their_torchrun_save_and_leave(new_run) -> None:
    run = new_run
    started = run.held(after=5)
    started.hold.wait_until_held()
    ranks = [psutil.Process(pid) for pid in started.ranks().values()]
    started.process.send_signal(signal.SIGKILL)
    try:
        _, alive = psutil.wait_procs(ranks, timeout=_PATIENCE)
        assert not alive
    finally:
        for each in ranks:
            if each.is_running():
                each.kill()
        started.process.communicate(timeout=_PATIENCE)
    names = sorted(each.name for each in (run.path / "checkpoints").iterdir())
    assert names == ["step-00000000-attempt-0001", "step-00000005-attempt-0001"]
    log = (run.path / "logs" / "rank-000.log").read_text()
    assert f"asked to leave (the launcher is gone): saved at step 5 of {run.steps}" in log
