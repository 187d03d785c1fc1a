"""The preflight's collectives: their time limits, and what becomes of one that fails or hangs."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from foveal.distributed import preflight
from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preflight import PreflightGroup, PreflightTimeouts
from foveal.doctor import runner
from foveal.doctor.report import RankReport
from foveal.doctor.verdict import judge_reports
from foveal.errors import BadNodeError, LaunchError, StorageUnreachableError, TrainingHungError

_HEALTHY_START, _HEALTHY_ALL_REDUCES = 0.06, 0.012  # seconds a rank on 1,024 ranks: twice what large jobs need
MISUSE = "NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage: y\nLast error:\nDuplicate GPU detected"


@pytest.fixture(autouse=True)
def no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", *preflight._NCCL_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def agreements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks whose processors were connected; tests/doors/test_plan_doctor.py connects real ones."""
    connected: list[int] = []

    def connect(_store: dist.Store, rank: int, *_: object) -> HostCollectives:
        connected.append(rank)
        return HostCollectives([])

    monkeypatch.setattr(preflight.HostCollectives, "connect", connect)
    return connected


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set at the end, so that a call that hangs leaves no thread."""
    event = threading.Event()
    yield event
    event.set()


def group_of(
    rank: int, size: int, device: str = "cpu", connection: float = 60.0, all_reduces: float = 60.0
) -> PreflightGroup:
    timeouts = PreflightTimeouts(1.0, connection, all_reduces)
    launch_env = LaunchEnv(rank, size, rank, "srun")
    return PreflightGroup(launch_env, torch.device(device), "node1", timeouts, dist.HashStore(), time.monotonic())


def test_the_limits_grow_with_ranks() -> None:
    small, large = (PreflightTimeouts.for_world_size(size) for size in (8, 1024))
    assert (small.rank_checks, large.rank_checks) == (28.0, 28.0), "each rank by itself"
    assert large.connection > 1024 * _HEALTHY_START and large.all_reduces > 1024 * _HEALTHY_ALL_REDUCES
    assert small.end < 75 and large.end < 240
    for timeouts in (small, large):
        assert timeouts.end > timeouts.rank_checks + timeouts.collectives + 3 * runner._TIMEOUT_MARGIN


def test_nccl_ends_no_process_before_the_verdict(monkeypatch: pytest.MonkeyPatch, agreements: list[int]) -> None:
    """Its own thread would end ranks with code 134, which is requeued, at the group's time-out or at an error."""
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}

    def init_process_group(_backend: str, **given: Any) -> None:
        options.update(given)
        environment.update(os.environ)

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    group = group_of(1, 2, "cuda:1")
    group.connect_ranks()
    assert agreements == [1], "a run's agreements need TCP between the nodes, which NCCL may not"
    assert options["timeout"].total_seconds() > group.timeouts.end, "the process is gone before"
    assert options["device_id"] == torch.device("cuda", 1), "the start is not a part of the first all-reduce"
    assert environment["TORCH_NCCL_BLOCKING_WAIT"] == "1" and environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"


@pytest.mark.parametrize(
    ("hanging", "limit", "activity"),
    [
        ("init_process_group", "connection", "connecting over gloo"),
        ("all_reduce", "all_reduces", "an all-reduce over gloo"),
    ],
)
def test_a_collective_that_hangs_ends_at_its_own_limit(
    hanging: str, limit: str, activity: str, over: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, hanging, lambda *_, **__: over.wait())
    limits: Any = {limit: 0.2}
    report, started = RankReport("node1", 1), time.monotonic()
    runner._check_collectives(group_of(1, 2, **limits), report)
    assert time.monotonic() - started < 30  # and not the limit of the other
    ((kind, sentence),) = report.faults
    assert kind == "config"
    assert f"rank 1 on node1: {activity} failed (no answer within 0.2 s); choose the network interface" in sentence


@pytest.mark.parametrize(
    ("text", "restarts", "code"),
    [
        ("unhandled system error", "0", LaunchError.exit_code),
        ("unhandled system error", "3", StorageUnreachableError.exit_code),  # this job has trained: a node is at fault
        (MISUSE, "0", LaunchError.exit_code),
        (MISUSE, "3", LaunchError.exit_code),
    ],
)
def test_ranks_that_never_reached_one_another_are_not_requeued(
    text: str, restarts: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init_process_group(*_: object, **__: object) -> None:
        raise dist.DistBackendError(text)

    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    reports = [RankReport(f"node{rank}", rank) for rank in range(2)]
    for report in reports:
        runner._check_collectives(group_of(report.rank, 2), report)
    assert judge_reports(reports, {}, 0.8).exit_code == code
    reports[0].faults.clear()
    assert judge_reports(reports, {}, 0.8).exit_code == BadNodeError.exit_code, "one node alone is a bad node"


def test_the_error_of_a_connection_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By that of leaving a group which was never made."""

    def init_process_group(*_: object, **__: object) -> None:
        raise RuntimeError("[/src/gloo/device.cc:9] no such interface")

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with pytest.raises(LaunchError, match="rank 0 on node1: connecting over gloo failed \\(no such interface\\)"):
        group_of(0, 2).connect_ranks()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(TrainingHungError, match="no such interface"):
        group_of(0, 2).connect_ranks()


def test_a_store_with_many_ranks_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        group.announce("go", 3)

    monkeypatch.setattr(preflight.time, "sleep", sleep)
    for size in (2, 2048):
        group = group_of(0, size)
        assert group.wait_for_announcement("go", 60.0) == 3
    assert pauses == [0.01, 0.2048]


class CountingStore:
    """A store that counts the requests and the keys in them."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.num_requests = self.num_keys = 0

    def __getattr__(self, name: str) -> Any:
        def request(keys: Any, *more: Any) -> Any:
            self.num_requests += 1
            self.num_keys += len(keys) if isinstance(keys, list) else 1
            return getattr(self._store, name)(keys, *more)

        return request


def rank_of_64(rank: int, store: Any, elapsed: float = 0.0) -> PreflightGroup:
    launch_env, timeouts = LaunchEnv(rank, 64, rank, "srun"), PreflightTimeouts(1.0, 1.0, 1.0)
    return PreflightGroup(launch_env, torch.device("cpu"), "node1", timeouts, store, time.monotonic() - elapsed)


def test_reports_are_read_once_however_long_the_last_rank_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 ranks that were asked for one by one took a request each in every poll."""
    store, polls = CountingStore(dist.HashStore()), iter(range(10))

    def sleep(_: float) -> None:
        if next(polls) == 9:
            rank_of_64(63, store._store).post_report("alone", {"rank": 63})

    monkeypatch.setattr(preflight.time, "sleep", sleep)
    for rank in range(63):
        rank_of_64(rank, store._store).post_report("alone", {"rank": rank})
    assert rank_of_64(0, store).gather_reports_until("alone", 600.0) == {rank: {"rank": rank} for rank in range(64)}
    assert (store.num_requests, store.num_keys) == (11 + 2, 11 + 2 * 64)


@pytest.mark.parametrize("lost", [{3}, {0, 17, 63}, set(range(64))], ids=["one", "three", "all"])
def test_reports_that_exist_at_the_end_are_found_without_the_others(lost: set[int]) -> None:
    store = CountingStore(dist.HashStore())
    for rank in set(range(64)) - lost:
        rank_of_64(rank, store._store).post_report("alone", {"rank": rank})
    reports = rank_of_64(0, store, elapsed=2.0).gather_reports_until("alone", 1.0)
    assert reports == {rank: {"rank": rank} for rank in set(range(64)) - lost}
    assert store.num_requests <= 1 + min(2 * 64, 3 * 6 * len(lost)), "three for each of six halvings around a lost rank"
