"""The watchdog of a rank, poll by poll: no test here waits for time to pass."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from foveal.distributed import heartbeat, watchdog
from foveal.distributed.heartbeat import Heartbeat, HeartbeatExchange, diagnose_heartbeats
from foveal.distributed.watchdog import Timeouts, Watchdog, locate_and_check_waiting, run_watchdog
from foveal.distributed.world import World

WAIT = 60  # seconds until a thread runs on a busy machine
SINGLE = World(0, 1, 0, "none", torch.device("cpu"))
# Ten idle polls, or ten medians, are a stall; thirty are a hang, in the first step 120.
QUICK = Timeouts(poll_interval=1.0, min_stall_seconds=10.0, stall_factor=10.0, hang_margin=5.0, first_step_factor=4.0)
HERE = Heartbeat(step=12, activity="data", idle_seconds=70.0, poll_count=900, host="a", location="", is_waiting=False)


class ProcessEnded(BaseException):
    """Raised in place of the end of the process."""


@pytest.fixture(autouse=True)
def no_dump_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that a watchdog sets is gone after the test."""
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[IO[str]]:
    with (tmp_path / "rank-000.log").open("a") as file:
        yield file


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The watchdog's log messages. Reports run in the calling thread, and the end of the process is an exception."""

    def exit_process(code: int) -> None:
        raise ProcessEnded(code)

    monkeypatch.setattr(watchdog, "_run_in_thread", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(watchdog.os, "_exit", exit_process)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    return lambda: [record.getMessage() for record in caplog.records]


def poll(watcher: Watchdog, count: int) -> None:
    for _ in range(count):
        watcher.poll()


def running(log: IO[str]) -> Watchdog:
    """A watchdog that has recorded steps 1 and 2, of two polls each."""
    watcher = Watchdog(SINGLE, log, 30.0, QUICK, lambda _: None)
    for step in (1, 2, 3):
        watcher.heartbeat(step, "data")
        poll(watcher, 2)
    return watcher


def test_a_stall_and_its_end_are_reported_once(messages, log) -> None:
    watcher = running(log)
    poll(watcher, 18)
    assert messages() == []
    poll(watcher, 5)
    assert messages() == ["nothing has moved here for 20 s, in step 3: data"]
    stacks = Path(log.name).read_text()
    assert "the stacks of rank 0" in stacks
    assert "MainThread" in stacks
    assert "test_a_stall_and_its_end" in stacks
    watcher.heartbeat(3, "training")
    watcher.poll()
    assert messages()[1:] == ["step 3 (data) moves again after 25 s"]
    poll(watcher, 20)
    assert len(messages()) == 3, "another stall is reported again"


def test_short_steps_are_no_stall_below_the_floor(messages, log) -> None:
    watcher = Watchdog(SINGLE, log, 30.0, QUICK, print)
    for step in range(1, 100, 10):  # ten steps in one poll
        watcher.heartbeat(step, "data")
        watcher.poll()
    poll(watcher, 9)
    assert messages() == []
    watcher.poll()
    assert len(messages()) == 1


def test_a_slow_first_step_hides_no_stall(messages, log) -> None:
    watcher = Watchdog(SINGLE, log, 30.0, QUICK, print)
    for step, polls in ((1, 60), (2, 1), (3, 10)):  # it connects and compiles; the mean of both steps would be 30.5 s
        watcher.heartbeat(step, "data")
        poll(watcher, polls)
    watcher.poll()
    assert messages() == ["nothing has moved here for 10 s, in step 3: data"]


def test_every_heartbeat_is_progress(messages, log) -> None:
    watcher = running(log)
    for _ in range(40):
        watcher.heartbeat(3, "evaluating")
        poll(watcher, 9)
    assert messages() == []


def test_the_first_step_may_take_long_but_not_for_ever(messages, log) -> None:
    reasons: list[str] = []
    watcher = Watchdog(SINGLE, log, 30.0, QUICK, reasons.append)
    watcher.heartbeat(1, "data")
    poll(watcher, 120)
    assert messages() == [] and reasons == []
    with pytest.raises(ProcessEnded):
        watcher.poll()
    assert reasons[0].endswith(": nothing moved for 120 s, in step 1: data")


def test_the_reason_for_the_end_is_logged_even_if_on_hang_fails(messages, log) -> None:
    def fails(_: str) -> None:
        raise OSError("disk full")

    watcher = running(log)
    watcher._on_hang = fails
    poll(watcher, 28)
    with pytest.raises(ProcessEnded, match="5"):
        watcher.poll()
    assert messages()[-1] == f"rank 0 on {socket.gethostname()}: nothing moved for 30 s, in step 3: data"
    assert Path(log.name).read_text().count("the stacks of rank 0") == 2


def test_a_run_that_rolled_back_is_no_stall(messages, log) -> None:
    watcher = running(log)
    for step in (1, 2, 3):
        watcher.heartbeat(step, "data")
        poll(watcher, 8)
    assert messages() == []


def test_faulthandler_ends_the_process_only_if_there_are_several_ranks(
    monkeypatch: pytest.MonkeyPatch, log: IO[str]
) -> None:
    alarms: list[tuple[float, bool]] = []
    monkeypatch.setattr(
        watchdog.faulthandler,
        "dump_traceback_later",
        lambda seconds, **options: alarms.append((seconds, options["exit"])),
    )
    poll(Watchdog(SINGLE, log, 30.0, QUICK, print), 11)
    poll(Watchdog(replace(SINGLE, size=2), log, 30.0, QUICK, print), 1)
    assert alarms == [(135.0, False), (135.0, False), (135.0, True)]


def test_a_world_of_size_1_needs_no_store(tmp_path: Path) -> None:
    with run_watchdog(SINGLE, tmp_path / "logs", 5.0, print) as watcher:
        watcher.heartbeat(1, "data")
    assert not watcher._thread.is_alive()
    assert (tmp_path / "logs" / "rank-000.log").exists()
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "logs" / "flight-")


@pytest.mark.parametrize(
    ("peers", "silent", "sentence"),
    [
        ({1: replace(HERE, is_waiting=True)}, (), "the others wait for rank 0 on a in step 12: data"),
        (
            {1: replace(HERE, step=11, host="b", location="read, reader.py:88")},
            (),
            "behind, while others are in step 12: rank 1 on b in step 11: data (read, reader.py:88)",
        ),
        (
            {1: replace(HERE, step=11), 2: replace(HERE, host="b")},
            (2,),
            "rank 2 on b in step 12: data, then silent (stopped, dead, or inside a C call that lets no Python run)",
        ),
        (
            {1: replace(HERE, activity="ended by ValueError", poll_count=-1), 2: replace(HERE, step=11)},
            (),
            "rank 1 on a in step 12: ended by ValueError",
        ),
        (
            {1: replace(HERE, activity=heartbeat.LOST_PEER, poll_count=-1), 2: replace(HERE, step=11)},
            (1, 2),
            "rank 2 on a in step 11: data, then silent (stopped, dead, or inside a C call that lets no Python run)",
        ),
        ({2: replace(HERE, step=11)}, (), "no heartbeat yet from rank 1"),
        ({1: HERE, 2: HERE, 3: replace(HERE, activity="saving")}, (), None),
    ],
)
def test_who_is_behind(peers: dict[int, Heartbeat], silent: tuple[int, ...], sentence: str | None) -> None:
    diagnosis, blamed = diagnose_heartbeats({0: HERE} | peers, silent, world_size=max(peers) + 1)
    assert all(f"rank {rank} on {beat.host}" in diagnosis for rank, beat in blamed.items())
    assert bool(blamed) == (sentence is not None and "no heartbeat yet" not in sentence)
    assert diagnosis == (
        sentence or "no rank is behind: rank 3 on a in step 12: saving; ranks 0-2 on a in step 12: data"
    )


def test_a_thousand_ranks_fit_into_a_sentence() -> None:
    heartbeats = {rank: replace(HERE, host=f"node{rank // 8}", is_waiting=rank != 500) for rank in range(1000)}
    diagnosis, blamed = diagnose_heartbeats(heartbeats, (), 1000)
    assert (diagnosis, set(blamed)) == ("the others wait for rank 500 on node62 in step 12: data", {500})
    diagnosis, _ = diagnose_heartbeats(heartbeats, set(range(0, 1000, 2)), 1000)
    assert diagnosis.startswith("ranks 0, 2, 4, 6 on node0 in step 12: data; ")
    assert "and 119 groups of ranks more, then silent" in diagnosis


def _frame(module: str) -> FrameType:
    """A frame of a function of a module."""
    scope: dict[str, object] = {"__name__": module, "sys": sys}
    exec("def function(): return sys._getframe()", scope)  # noqa: S102 - as if defined in that module
    return scope["function"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("module", "is_waiting"),
    [
        ("torch.distributed.distributed_c10d", True),
        ("deepspeed.comm.torch", True),
        ("foveal.distributed.world", True),
        ("foveal.data.storage.reader", False),
        ("pretrain.objective", False),
        ("__main__", False),
    ],
)
def test_a_location_is_in_our_code_or_in_a_waiting_module(module: str, is_waiting: bool) -> None:
    assert locate_and_check_waiting(_frame(module)) == ("function, <string>:1", is_waiting)


def test_the_location_inside_a_library_is_its_call_in_our_code() -> None:
    location, is_waiting = locate_and_check_waiting(_frame("numpy.core"))
    assert not location.startswith("function") and not is_waiting
    assert locate_and_check_waiting(None) == ("", False)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """A store, served by this process as by rank 0."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    return server


def exchange_of(rank: int, size: int, interval: float, read: Callable[[], Heartbeat]) -> HeartbeatExchange:
    return HeartbeatExchange(World(rank, size, 0, "none", torch.device("cpu")), interval, read)


def leave(exchange: HeartbeatExchange, reason: str) -> None:
    """Close an exchange, which waits for its last heartbeat for two polls only."""
    exchange.close(reason)
    exchange._thread.join(WAIT)
    assert not exchange._thread.is_alive()


def test_a_silent_rank_is_named(store) -> None:
    poll_counts = iter(range(10**6))
    first = exchange_of(0, 2, 0.05, lambda: replace(HERE, poll_count=next(poll_counts), is_waiting=True))
    second = exchange_of(1, 2, 0.05, lambda: replace(HERE, step=9, activity="decoding"))  # its poll count stands still
    store.wait(["foveal//beat/1"])
    assert first.diagnose().startswith("rank 1 on a in step 9: decoding, then silent")
    leave(second, "ended by ValueError")
    assert first.diagnose() == "rank 1 on a in step 9: ended by ValueError"
    first.close("left")
    assert json.loads(store.get("foveal//beat/1"))["poll_count"] == -1


def test_of_many_ranks_the_first_compare(store) -> None:
    late = exchange_of(heartbeat._MAX_COMPARING_RANKS, 1000, 0.05, lambda: HERE)
    assert late.diagnose() == "the logs of ranks 0-63 name the ranks that are behind"
    late.close("left")


def test_the_heartbeats_of_many_ranks_are_few_requests(store) -> None:
    requests: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: requests.append(name) or getattr(store, name)(*arguments)

    exchange = exchange_of(0, 1000, 60.0, lambda: HERE)
    store.multi_set([f"beat/{rank}" for rank in range(1000)], [json.dumps(asdict(HERE))] * 1000)
    assert exchange._read_all_heartbeats(Counting()) == dict.fromkeys(range(1000), HERE)  # pyright: ignore[reportArgumentType]
    assert requests == ["check", "multi_get"]
    store.delete_key("beat/7")
    assert exchange._read_all_heartbeats(Counting()).keys() == set(range(1000)) - {7}  # pyright: ignore[reportArgumentType]
    assert len(requests) < 40
    exchange.close("left")


def test_a_store_that_is_gone_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "StoreServerProbe", _refuse)
    exchange = exchange_of(1, 2, 0.01, lambda: HERE)
    exchange._thread.join(WAIT)
    assert exchange.diagnose() == "the store of the ranks, on the node of rank 0, is gone: the log of rank 0 says more"
    exchange.close("left")


def _refuse(seconds: float) -> NoReturn:
    raise ConnectionRefusedError


def test_a_heartbeat_survives_json() -> None:
    assert Heartbeat(**json.loads(json.dumps(asdict(HERE)))) == HERE


def test_a_rank_that_lost_a_peer_names_it_once(store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peer = exchange_of(1, 2, 0.02, lambda: replace(HERE, step=0))
    store.wait(["foveal//beat/1"])
    with pytest.raises(dist.DistBackendError, match="rank 1 on a in step 0: data, then silent"):
        _loses_a_peer(tmp_path)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.partition(" on ")[0] for error in errors] == ["step 7: rank 1"]
    deadline = time.monotonic() + WAIT
    while json.loads(store.get("foveal//beat/0"))["activity"] != heartbeat.LOST_PEER:
        assert time.monotonic() < deadline
    peer.close("left")


def _loses_a_peer(logs: Path) -> NoReturn:
    with run_watchdog(replace(SINGLE, size=2), logs, 60.0, print, Timeouts(poll_interval=0.02)) as watcher:
        watcher.heartbeat(7, "data")
        raise dist.DistBackendError(watcher.log_diagnosis_once())


def test_a_world_of_size_1_has_no_diagnosis(log) -> None:
    assert Watchdog(SINGLE, log, 30.0, QUICK, print).log_diagnosis_once() == ""
