"""The watch of a rank, looked at look by look: no test here waits for time to pass."""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import pytest
import torch
import torch.distributed as dist

from foveal.distributed import heartbeat, watchdog
from foveal.distributed.heartbeat import Heartbeat, HeartbeatExchange, diagnose_heartbeats
from foveal.distributed.watchdog import Timeouts, Watchdog, locate_frame, run_watchdog
from foveal.distributed.world import World

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
# Ten looks without a sign are a stall, or ten medians; thirty are the end, and a hundred and twenty in the first step.
QUICK = Timeouts(poll_interval=1.0, min_stall_seconds=10.0, stall_factor=10.0, hang_margin=5.0, first_step_factor=4.0)
HERE = Heartbeat(step=12, activity="data", idle_seconds=70.0, poll_count=900, host="a", location="", is_waiting=False)


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[IO[str]]:
    with (tmp_path / "rank-000.log").open("a") as file:
        yield file


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the watch said; what it says aside is said at once, and the end of the process is an exception."""

    def leave(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(watchdog, "_run_in_thread", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    return lambda: [record.getMessage() for record in caplog.records]


def looks(watched: Watchdog, number: int) -> None:
    for _ in range(number):
        watched.poll()


def running(log: IO[str], why: list[str] | None = None) -> Watchdog:
    """A watch that has seen steps 1 and 2, of two looks each."""
    watched = Watchdog(ALONE, log, 30.0, QUICK, (why if why is not None else []).append)
    for step in (1, 2, 3):
        watched.heartbeat(step, "data")
        looks(watched, 2)
    return watched


def test_a_stall_is_told_once_with_all_stacks_and_so_is_its_end(said, log) -> None:
    watched = running(log)
    looks(watched, 18)
    assert said() == []
    looks(watched, 5)
    assert said() == ["nothing has moved here for 20 s, in step 3: data"]
    stacks = Path(log.name).read_text()
    assert "the stacks of rank 0" in stacks
    assert "MainThread" in stacks
    assert "test_a_stall_is_told_once" in stacks
    watched.heartbeat(3, "training")
    watched.poll()
    assert said()[1:] == ["step 3 (data) moves again after 25 s"]
    looks(watched, 20)
    assert len(said()) == 3, "another stall is told again"


def test_short_steps_are_no_stall_below_the_floor(said, log) -> None:
    watched = Watchdog(ALONE, log, 30.0, QUICK, print)
    for step in range(1, 100, 10):  # ten steps in one look
        watched.heartbeat(step, "data")
        watched.poll()
    looks(watched, 9)
    assert said() == []
    watched.poll()
    assert len(said()) == 1


def test_every_beat_is_a_sign(said, log) -> None:
    watched = running(log)
    for _ in range(40):
        watched.heartbeat(3, "evaluating")
        looks(watched, 9)
    assert said() == []


def test_the_first_step_may_take_long_but_not_for_ever(said, log) -> None:
    why: list[str] = []
    watched = Watchdog(ALONE, log, 30.0, QUICK, why.append)
    watched.heartbeat(1, "data")
    looks(watched, 120)
    assert said() == [] and why == []
    with pytest.raises(Ended):
        watched.poll()
    assert why[0].endswith(": nothing moved for 120 s, in step 1: data")


def test_the_end_says_why_even_if_that_fails(said, log) -> None:
    def fails(_: str) -> None:
        raise OSError("disk full")

    watched = running(log)
    watched._on_hung = fails
    looks(watched, 28)
    with pytest.raises(Ended, match="5"):
        watched.poll()
    assert said()[-1] == f"rank 0 on {socket.gethostname()}: nothing moved for 30 s, in step 3: data"
    assert Path(log.name).read_text().count("the stacks of rank 0") == 2


def test_a_run_that_rolled_back_is_no_stall(said, log) -> None:
    watched = running(log)
    for step in (1, 2, 3):
        watched.heartbeat(step, "data")
        looks(watched, 8)
    assert said() == []


def test_faulthandler_is_the_last_line_and_only_kills_among_others(
    monkeypatch: pytest.MonkeyPatch, log: IO[str]
) -> None:
    alarms: list[tuple[float, bool]] = []
    monkeypatch.setattr(
        watchdog.faulthandler, "dump_traceback_later", lambda late, **how: alarms.append((late, how["exit"]))
    )
    looks(Watchdog(ALONE, log, 30.0, QUICK, print), 11)
    looks(Watchdog(replace(ALONE, size=2), log, 30.0, QUICK, print), 1)
    assert alarms == [(135.0, False), (135.0, False), (135.0, True)]


def test_alone_it_begins_and_ends_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    with run_watchdog(ALONE, tmp_path / "logs", 5.0, print) as watched:
        watched.heartbeat(1, "data")
    assert not watched._thread.is_alive()
    assert (tmp_path / "logs" / "rank-000.log").exists()
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "logs" / "flight-")


@pytest.mark.parametrize(
    ("others", "silent", "sentence"),
    [
        ({1: replace(HERE, waits=True)}, (), "the others wait for rank 0 on a in step 12: data"),
        (
            {1: replace(HERE, step=11, host="b", place="read, reader.py:88")},
            (),
            "behind, while others are in step 12: rank 1 on b in step 11: data (read, reader.py:88)",
        ),
        (
            {1: replace(HERE, step=11), 2: replace(HERE, host="b")},
            (2,),
            "rank 2 on b in step 12: data, then silent (stopped, dead, or inside a C call that lets no Python run)",
        ),
        (
            {1: replace(HERE, doing="ended by ValueError", looks=-1), 2: replace(HERE, step=11)},
            (),
            "rank 1 on a in step 12: ended by ValueError",
        ),
        (
            {1: replace(HERE, doing=heartbeat.LOST_PEER, looks=-1), 2: replace(HERE, step=11)},
            (1, 2),
            "rank 2 on a in step 11: data, then silent (stopped, dead, or inside a C call that lets no Python run)",
        ),
        ({2: replace(HERE, step=11)}, (), "nothing was heard yet of rank 1"),
        ({1: HERE, 2: HERE, 3: replace(HERE, doing="saving")}, (), None),
    ],
)
def test_who_is_behind(others: dict[int, Heartbeat], silent: tuple[int, ...], sentence: str | None) -> None:
    said, accused = diagnose_heartbeats({0: HERE} | others, silent, world_size=max(others) + 1)
    assert all(f"rank {rank} on {beat.host}" in said for rank, beat in accused.items())
    assert bool(accused) == (sentence is not None and "nothing was heard" not in sentence)
    assert said == (sentence or "no rank is behind: rank 3 on a in step 12: saving; ranks 0-2 on a in step 12: data")


def test_a_thousand_ranks_fit_into_a_sentence() -> None:
    crowd = {rank: replace(HERE, host=f"node{rank // 8}", waits=rank != 500) for rank in range(1000)}
    said, accused = diagnose_heartbeats(crowd, (), 1000)
    assert (said, set(accused)) == ("the others wait for rank 500 on node62 in step 12: data", {500})
    said, _ = diagnose_heartbeats(crowd, set(range(0, 1000, 2)), 1000)
    assert said.startswith("ranks 0, 2, 4, 6 on node0 in step 12: data; ")
    assert "and 119 groups of ranks more, then silent" in said


def _frame(module: str) -> FrameType:
    """A frame of a function of that module."""
    scope: dict[str, object] = {"__name__": module, "sys": sys}
    exec("def there(): return sys._getframe()", scope)  # noqa: S102 - as if in that module
    return scope["there"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "waits"),
    [
        ("torch.distributed.distributed_c10d", True),
        ("deepspeed.comm.torch", True),
        ("foveal.distributed.world", True),
        ("foveal.data.storage.reader", False),
        ("pretrain.objective", False),
        ("__main__", False),
    ],
)
def test_a_place_is_ours_or_where_ranks_wait_for_one_another(module: str, waits: bool) -> None:
    place, found = locate_frame(_frame(module))
    assert (place, found) == ("there, <string>:1", waits)


def test_a_place_inside_a_library_is_where_we_called_it() -> None:
    place, waits = locate_frame(_frame("numpy.core"))
    assert not place.startswith("there") and not waits
    assert locate_frame(None) == ("", False)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A store as rank 0 serves it."""
    served = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(served.port)}.items():
        monkeypatch.setenv(name, value)
    return served


def beats_of(rank: int, size: int, look: float, mine: Callable[[], Heartbeat]) -> HeartbeatExchange:
    return HeartbeatExchange(World(rank, size, 0, "none", torch.device("cpu")), look, mine)


def test_two_ranks_hear_who_is_silent(store) -> None:
    counted = iter(range(10**6))
    first = beats_of(0, 2, 0.05, lambda: replace(HERE, looks=next(counted), waits=True))
    second = beats_of(1, 2, 0.05, lambda: replace(HERE, step=9, doing="decoding"))  # its looks do not move
    store.wait(["foveal//beat/1"])
    assert first.diagnose().startswith("rank 1 on a in step 9: decoding, then silent")
    second.close("ended by ValueError")
    assert first.diagnose() == "rank 1 on a in step 9: ended by ValueError"
    first.close("left")
    assert json.loads(store.get("foveal//beat/1"))["looks"] == -1


def test_of_many_ranks_the_first_compare(store) -> None:
    late = beats_of(heartbeat._MAX_COMPARING_RANKS, 1000, 0.05, lambda: HERE)
    assert late.diagnose() == "who is behind stands in the logs of ranks 0-63"
    late.close("left")


def test_a_store_that_is_gone_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "ServerProbe", _refuse)
    alone = beats_of(1, 2, 0.01, lambda: HERE)
    alone._thread.join()
    assert alone.diagnose() == "the store of the ranks, on the node of rank 0, is gone: the log of rank 0 says more"
    alone.close("left")


def _refuse(seconds: float) -> NoReturn:
    raise ConnectionRefusedError


def test_a_beat_survives_the_store() -> None:
    assert Heartbeat(**json.loads(json.dumps(asdict(HERE)))) == HERE


def test_who_lost_a_peer_says_once_who_it_was(store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = beats_of(1, 2, 0.02, lambda: replace(HERE, step=0))
    store.wait(["foveal//beat/1"])
    with pytest.raises(dist.DistBackendError, match="rank 1 on a in step 0: data, then silent"):
        _loses_a_peer(tmp_path)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.partition(" on ")[0] for error in errors] == ["step 7: rank 1"]
    assert json.loads(store.get("foveal//beat/0"))["doing"] == heartbeat.LOST_PEER
    other.close("left")


def _loses_a_peer(logs: Path) -> NoReturn:
    with run_watchdog(replace(ALONE, size=2), logs, 60.0, print, Timeouts(poll_interval=0.02)) as watched:
        watched.heartbeat(7, "data")
        raise dist.DistBackendError(watched.diagnose())


def test_alone_nobody_is_accused(log) -> None:
    assert Watchdog(ALONE, log, 30.0, QUICK, print).diagnose() == ""
