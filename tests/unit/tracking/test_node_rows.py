"""Lines of nodes.jsonl become MLflow's system metrics: each once, whatever fails, of 64 nodes at most."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_store import Kept
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from points import in_jsonl

from foveal.tracking import node_rows
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.node_rows import MAX_NODES, NodeRows, find_missing_points, parse_points
from foveal.tracking.sync import RunSync


def line(step: int, node: str = "n1", **numbers: Any) -> bytes:
    row = {"step": step, "time": 1000.0 + step, "node": node} | (numbers or {"cpu_utilization_percentage": float(step)})
    return (json.dumps(row) + "\n").encode()


def write(run: Path, *lines: bytes) -> None:
    with (run / "nodes.jsonl").open("ab") as stream:
        stream.writelines(lines)


@pytest.fixture
def rows(tmp_path: Path) -> NodeRows:
    rows = NodeRows(tmp_path)
    rows.on_connected("1", {})
    return rows


def steps(store: Kept, name: str = "system/cpu_utilization_percentage.n1") -> list[int]:
    return [step for other, _, _, step in store.points if other == name]


def test_names_are_those_of_mlflow() -> None:
    monitor = CPUMonitor()
    monitor.collect_metrics()
    numbers = dict.fromkeys(monitor.metrics, 1.0) | {"gpu_power_usage_watts": [300.0, None, 250.5]}
    points = list(parse_points(line(7, "node-1", **numbers)))
    assert ("system/cpu_utilization_percentage.node-1", 1.0, 1_007_000, 7) in points
    gpus = [(name, value) for name, value, _, _ in points if "gpu" in name]
    assert gpus == [
        ("system/gpu_0_power_usage_watts.node-1", 300.0),
        ("system/gpu_2_power_usage_watts.node-1", 250.5),
    ]


@pytest.mark.parametrize(
    "damaged", [b"{\n", b"[]\n", b"3\n", b'{"step": 1}\n', b'{"step": "x", "time": 1, "node": "a"}\n']
)
def test_a_damaged_line_is_left_out(damaged: bytes, rows: NodeRows, tmp_path: Path) -> None:
    store = Kept()
    write(tmp_path, line(1), damaged, line(2))
    rows.upload(store)
    assert steps(store) == [1, 2]


def test_only_whole_lines_and_each_once(rows: NodeRows, tmp_path: Path) -> None:
    store = Kept()
    rows.upload(store)  # no file yet
    write(tmp_path, line(1), line(2)[:20])
    rows.upload(store)
    rows.upload(store)
    assert steps(store) == [1]
    write(tmp_path, line(2)[20:], line(3))
    rows.upload(store)
    assert steps(store) == [1, 2, 3]


def test_a_request_that_fails_is_repeated_and_one_that_arrived_is_not(
    rows: NodeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_rows, "MAX_POINTS", 2)
    store = Kept()
    write(tmp_path, *(line(step) for step in range(1, 8)))

    def fail(_verb: str) -> None:
        if len(store.requests) in (2, 3):
            raise ConnectionError

    for name in ("before", "after"):
        setattr(store, name, fail)
        for _ in range(4):
            try:
                rows.upload(store)
            except ConnectionError:
                rows.on_connected("1", store.get_latest_steps())
        store.requests.clear()
    assert steps(store) == list(range(1, 8))


def test_repeated_steps_are_delivered_while_connected_and_left_out_after_a_restart(tmp_path: Path) -> None:
    store = Kept()
    write(tmp_path, line(10), line(20))
    first = NodeRows(tmp_path)
    first.on_connected("1", {})
    first.upload(store)
    write(tmp_path, line(20), line(30))  # after a resume from step 10
    second = NodeRows(tmp_path)
    second.on_connected("1", store.get_latest_steps())
    second.upload(store)
    assert steps(store) == [10, 20, 30]
    write(tmp_path, line(25))  # after a roll-back
    second.upload(store)
    assert steps(store) == [10, 20, 30, 25]


def test_a_store_that_lost_the_run_gets_all(rows: NodeRows, tmp_path: Path) -> None:
    write(tmp_path, line(1), line(2))
    rows.upload(Kept())
    other = Kept()
    rows.on_connected("2", {})
    rows.upload(other)
    assert steps(other) == [1, 2]


def test_at_most_64_nodes_and_a_thousand_points_a_request(rows: NodeRows, tmp_path: Path) -> None:
    store, gpus = Kept(), {"gpu_utilization_percentage": [1.0] * 16}
    for step in (1, 2):
        write(tmp_path, *(line(step, f"n{node}", **gpus) for node in range(MAX_NODES + 6)))
    rows.upload(store)
    assert len(store.points) == 2 * MAX_NODES * 16
    assert {name.partition(".")[2] for name, *_ in store.points} == {f"n{node}" for node in range(MAX_NODES)}
    assert max(store.requests) <= 1000


def test_a_requeued_run_on_other_nodes(rows: NodeRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that have been silent for ten minutes make room, those of this attempt do not; a repetition changes nothing."""
    monkeypatch.setattr(node_rows, "MAX_NODES", 2)
    store = Kept()
    write(tmp_path, line(1, "a"), line(2, "b"), line(600, "c"), line(603, "d"), line(604, "e"), line(605, "f"))

    def fail(_verb: str) -> None:
        store.before = lambda _: None
        raise ConnectionError

    store.before = fail
    with pytest.raises(ConnectionError):
        rows.upload(store)
    rows.upload(store)
    assert [name.partition(".")[2] for name, *_ in store.points] == ["a", "b", "d", "e"]
    other = Kept()
    rows.on_connected("2", {})
    rows.upload(other)
    assert other.points == store.points


def test_what_is_missing() -> None:
    points = [("a", 1.0, 0, 5), ("a", 1.0, 0, 6), ("b", 1.0, 0, 1)]
    assert find_missing_points(points, {"a": 5}) == points[1:]


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[JsonlTracker]:
    tracker = JsonlTracker(tmp_path, 0)
    yield tracker
    tracker._stream.close()


def test_a_runs_upload_has_them_beside_the_rows(tracker: JsonlTracker, tmp_path: Path) -> None:
    store = Kept()
    sync = RunSync(tmp_path, tracker.open_tail(), store.connected)
    tracker.log_rows([{"step": 1, "loss": 1.0}])
    write(tmp_path, line(1))
    sync.upload_rows_and_tags()
    assert store.numbers() == in_jsonl(tmp_path) | {("system/cpu_utilization_percentage.n1", 1): [1.0]}
    assert (sync.counts.rows_sent, sync.counts.rows_already_stored) == (1, 0)
    sync.close()
