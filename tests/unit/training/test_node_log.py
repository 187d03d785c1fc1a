"""nodes.jsonl: a line for each node and write, in the exchange that the ranks have anyway."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.atomic import AppendLog
from foveal.distributed.world import World
from foveal.training.config import LogConfig
from foveal.training.meters.node_usage import NodeMeter, NodeSample
from foveal.training.meters.stragglers import StragglerMeter
from foveal.training.node_log import NodeLog, open_node_log


class FakeMeter:
    """A meter whose reports are due whenever it is asked."""

    def __init__(self, percent: float) -> None:
        self.percent, self.asked, self.closed = percent, [], False

    def pop(self, num_nodes: int) -> NodeSample | None:
        self.asked.append(num_nodes)
        return {"cpu_utilization_percentage": self.percent}

    def close(self) -> None:
        self.closed = True


def exchange(logs: list[NodeLog], records: list[Any]) -> list[list[Any]]:
    """Let each rank's log take part in one gather; return what each rank's meter is given."""
    sent: list[Any] = []
    for log, record in zip(logs, records, strict=True):
        log.share_exchange(lambda value: sent.append(value) or [value])(record)
    return [log.share_exchange(lambda _: sent)(record) for log, record in zip(logs, records, strict=True)]


def test_numbers_of_all_nodes_travel_with_the_ranks_records(tmp_path: Path) -> None:
    """Four ranks on two nodes: the straggler meter sees its own records only, and rank 0 has both nodes."""
    meters: list[Any] = [FakeMeter(10.0), None, FakeMeter(20.0), None]
    file = tmp_path / "nodes.jsonl"
    logs = [NodeLog(file if rank == 0 else None, meter, f"node-{rank // 2}") for rank, meter in enumerate(meters)]
    records = [{"host": f"node-{rank // 2}"} for rank in range(4)]
    assert exchange(logs, records) == [records] * 4
    for log in logs:
        log.write(20)
        log.write(20)  # what is written is written once
    first, second = [json.loads(line) for line in file.read_text().splitlines()]
    assert [first["node"], second["node"]] == ["node-0", "node-1"]
    assert (first["step"], first["cpu_utilization_percentage"]) == (20, 10.0)
    assert first["time"] == second["time"] == round(first["time"], 3)
    exchange(logs, records)
    assert meters[0].asked[-1] == 2, "the meters learn how many nodes there are"


def test_one_rank_alone(tmp_path: Path) -> None:
    meter: Any = FakeMeter(5.0)
    log = NodeLog(tmp_path / "nodes.jsonl", meter, "here")
    metrics, table = StragglerMeter(torch.device("cpu"), "here").pop_metrics_and_table(
        3, log.share_exchange(lambda value: [value])
    )
    assert (metrics, table) == ({}, [])
    log.write(3)
    assert json.loads((tmp_path / "nodes.jsonl").read_text())["cpu_utilization_percentage"] == 5.0
    log.close()
    assert meter.closed


def test_nodes_of_the_same_name_and_of_strange_names(tmp_path: Path) -> None:
    """Containers may all be called the same; a name is a part of a metric's name."""
    meters: list[Any] = [FakeMeter(1.0), FakeMeter(2.0), FakeMeter(3.0)]
    names = ("box", "box", "a/<b>\n")
    file = tmp_path / "nodes.jsonl"
    logs = [NodeLog(file if rank == 0 else None, meters[rank], name) for rank, name in enumerate(names)]
    exchange(logs, [{}, {}, {}])
    logs[0].write(1)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["node"] for line in lines] == ["box-rank0", "box-rank1", "a__b__"]


def test_a_file_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    meter: Any = FakeMeter(1.0)
    log = NodeLog(tmp_path / "gone" / "nodes.jsonl", meter, "here")
    for step in (1, 2):
        log.share_exchange(lambda value: [value])({})
        log.write(step)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage().startswith("nodes.jsonl is not written any more: ")


def test_a_full_disk_is_survived_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter: Any = FakeMeter(1.0)
    log = NodeLog(tmp_path / "nodes.jsonl", meter, "here")
    assert log._log is not None
    log._log.pending = b"x" * (1 << 21)

    def fail(_self: AppendLog, _values: Any) -> None:
        raise OSError(28, "No space left on device")

    log.share_exchange(lambda value: [value])({})
    log.write(1)
    assert len((tmp_path / "nodes.jsonl").read_bytes()) < 1000
    monkeypatch.setattr(AppendLog, "append_json_lines", fail)
    log.share_exchange(lambda value: [value])({})
    log.write(2)


def test_a_node_without_room_for_a_thread_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_self: NodeMeter) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(NodeMeter, "start", fail)
    log = open_node_log(tmp_path, World(0, 1, 0, "none", torch.device("cpu")), LogConfig())
    assert log._meter is None
    assert caplog.messages == ["the use of this node is not recorded (can't start new thread)"]
    log.close()


@pytest.mark.parametrize(("local_rank", "node_metrics"), [(0, True), (1, True), (0, False)])
def test_who_samples(local_rank: int, node_metrics: bool, tmp_path: Path) -> None:
    world = World(local_rank, 2, local_rank, "none", torch.device("cpu"))
    log = open_node_log(tmp_path, world, LogConfig(node_metrics=node_metrics))
    assert (log._meter is not None) == (local_rank == 0 and node_metrics)
    assert (log._log is not None) == (local_rank == 0 and node_metrics)
    log.close()
