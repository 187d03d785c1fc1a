"""A rank is killed, stopped, or hangs: every other rank ends in bounded time, and the logs say who it was and where."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from forked import Forked, ranks_of
from ports import free_port
from processes import Ended, Started

from foveal.errors import LaunchError, TrainingHungError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # of real processes, each several seconds
SCRIPT = Path(__file__).parents[1] / "support" / "stepping.py"
TIMEOUT = 8  # seconds of a collective
STACKS = "the stacks of rank "
_PATIENCE = 150
_LOOKS = 0.05


@dataclass
class Ranks:
    """Processes that know one another only by RANK and WORLD_SIZE: no launcher ends the others when one is gone."""

    folder: Path
    started: dict[int, Forked] = field(default_factory=dict)

    def start(self, size: int, how: str, who: int, *, absent: int | None = None, timeout: int = TIMEOUT) -> None:
        for rank, place in enumerate(ranks_of(size, free_port())):
            if rank != absent:
                self.started[rank] = Forked(SCRIPT, [self.folder, timeout, how, who], self.folder, **place)

    def signal(self, rank: int, number: signal.Signals, *, after: int = 1) -> None:
        """Send it once the rank has made so many steps."""
        file = self.folder / f"rank-{rank:03d}.step"
        wait_for(lambda: file.exists() and int(file.read_text() or 0) >= after, self.folder)
        self.started[rank].send_signal(number)

    def ended(self, rank: int) -> Ended:
        return self.started[rank].ended()

    def log(self, rank: int) -> str:
        return (self.folder / f"rank-{rank:03d}.log").read_text()

    def why(self, rank: int) -> str:
        return (self.folder / f"rank-{rank:03d}.why").read_text()

    def close(self) -> None:
        for each in self.started.values():
            each.process.kill()
            each.process.join()


def wait_for(there: Callable[[], bool], folder: Path) -> None:
    patience = time.monotonic() + _PATIENCE
    while not there():
        assert time.monotonic() < patience, f"what was waited for never came: {sorted(folder.iterdir())}"
        time.sleep(_LOOKS)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    found = Ranks(tmp_path)
    yield found
    found.close()


def lost(ended: Ended, rank: int) -> bool:
    """Whether a rank ended because it lost another, in a sentence."""
    sentence = f"rank {rank} lost a peer in a collective: "
    return ended.code == TrainingHungError.exit_code and sentence in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("victim", "words"),
    [
        pytest.param(0, "the store of the ranks, on the node of rank 0, is gone", marks=pytest.mark.thorough),
        (1, r"rank 1 on \S+ in step \d+: "),
    ],
)
def test_a_killed_rank_ends_the_others(ranks, victim: int, words: str) -> None:
    ranks.start(3, "none", victim)
    ranks.signal(victim, signal.SIGKILL, after=50)
    assert ranks.ended(victim).code == -signal.SIGKILL
    for other in {0, 1, 2} - {victim}:
        assert lost(ranks.ended(other), other), ranks.log(other)
    assert re.search(words, ranks.log(1 - victim))


@pytest.mark.thorough
def test_under_torchrun_a_killed_rank_leaves_no_process(tmp_path: Path) -> None:
    command = ["torchrun", "--standalone", "--nproc-per-node=2", SCRIPT, tmp_path, str(TIMEOUT), "none", "1"]
    started = Started(command, tmp_path)
    wait_for((tmp_path / "rank-001.step").exists, tmp_path)
    found = started.ranks()
    os.kill(found[1], signal.SIGKILL)
    assert started.ended().code != 0
    assert not [pid for pid in found.values() if psutil.pid_exists(pid)]


@pytest.mark.thorough
def test_a_stopped_rank_is_named_by_the_others_and_ends_when_it_goes_on(ranks) -> None:
    ranks.start(3, "none", 1)
    ranks.signal(1, signal.SIGSTOP, after=150)
    try:
        for other in (0, 2):
            assert lost(ranks.ended(other), other), ranks.log(other)
            log = ranks.log(other)
            assert f"{STACKS}{other}" in log
            assert "in all_reduce" in log, "the stacks show the collective that waits"
            assert re.search(r"rank 1 on \S+ in step \d+: (data|training)\b.*, then silent", log)
    finally:
        ranks.started[1].send_signal(signal.SIGCONT)
    assert ranks.ended(1).code in {TrainingHungError.exit_code, 1}  # its own collective, or faulthandler's alarm


@pytest.mark.thorough
def test_where_rank_0_is_stopped_its_store_is_too(ranks) -> None:
    ranks.start(2, "none", 0)
    ranks.signal(0, signal.SIGSTOP, after=150)
    try:
        assert lost(ranks.ended(1), 1), ranks.log(1)
        assert f"{STACKS}1" in ranks.log(1)
        assert "look at rank 0 first" in ranks.log(1)
    finally:
        ranks.started[0].send_signal(signal.SIGCONT)
    assert ranks.ended(0).code in {TrainingHungError.exit_code, 1}


@pytest.mark.parametrize("how", [pytest.param("loop", marks=pytest.mark.thorough), "sleep"])
def test_a_rank_that_hangs_by_itself_is_named_and_ended(ranks, how: str) -> None:
    ranks.start(2, how, 1)
    assert lost(ranks.ended(0), 0), ranks.log(0)
    assert ranks.ended(1).code == TrainingHungError.exit_code
    for rank in (0, 1):
        assert f"{STACKS}{rank}" in ranks.log(rank)
        assert re.search(
            r"the others wait for rank 1 on \S+ in step 200: data \(fail, stepping\.py:\d+\)", ranks.log(rank)
        )
    assert re.match(r"rank 1 on \S+: nothing moved for 14 s, in step 200: data", ranks.why(1))


@pytest.mark.thorough
def test_a_call_that_lets_no_python_run_is_named_and_ended(ranks) -> None:
    ranks.start(2, "hold", 1)
    assert lost(ranks.ended(0), 0), ranks.log(0)
    assert re.search(r"rank 1 on \S+ in step \d+: \w+.*, then silent", ranks.log(0))
    assert ranks.ended(1).code == 1, "faulthandler knows no other code"
    assert re.search(r"Timeout \(0:.*in fail\n", ranks.log(1), re.DOTALL), "the stacks say where"


@pytest.mark.thorough
def test_a_rank_that_raises_keeps_its_traceback_and_ends_the_others(ranks) -> None:
    ranks.start(2, "raise", 1)
    assert lost(ranks.ended(0), 0), ranks.log(0)
    ended = ranks.ended(1)
    assert ended.code == 1
    assert "ValueError: a mistake in the code" in ended.err


@pytest.mark.thorough
def test_a_late_rank_is_named_and_nothing_ends(ranks) -> None:
    ranks.start(2, "late", 1, timeout=10 * TIMEOUT)
    for rank in (0, 1):
        assert ranks.ended(rank).code == 0, ranks.log(rank)
        assert "the others wait for rank 1 on" in ranks.log(rank)
        told = re.search(r"step 200 \(data\) moves again after (\d+) s", ranks.log(rank))
        assert told is not None, ranks.log(rank)
        assert int(told[1]) >= 3, "it slept 8 s; looks are counted, and on a busy machine there are fewer of them"


@pytest.mark.thorough
def test_a_rank_that_never_comes_is_a_sentence_on_those_that_did(ranks) -> None:
    ranks.start(3, "absent", 0, absent=1)
    for rank in (0, 2):
        ended = ranks.ended(rank)
        assert ended.code == LaunchError.exit_code
        assert "but not rank 1: see why they did not start there" in ended.err
        assert "Traceback" not in ended.err
