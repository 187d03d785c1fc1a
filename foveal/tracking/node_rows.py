"""The lines of RUN/nodes.jsonl as metrics of the run, under MLflow's names: ``system/cpu_utilization_percentage.<node>``.

The node comes after a dot: MLflow's charts make a group of what stands before the last slash, put ``system`` last, and
would put ``system/<node>``, its own way, before the losses.

The file grows by whole lines and is never rewound, so that a byte offset says what is delivered. After a start and after
a failure the store's latest steps say it: lines of steps that a resume repeated are then left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from foveal.tracking.tracker import MetricPoint

MAX_NODES = 64  # whose metrics go to a store at a time: its page of a run shows every metric; nodes.jsonl has all
_SILENT_MS = 600_000  # a node makes room for another after it: a requeued run goes on on other nodes
MAX_POINTS = 1000  # per request: MLflow's limit
PREFIX = "system/"
_FACTS = ("step", "time", "node")
_CHUNK_BYTES = 1 << 18


class PointStore(Protocol):
    """What is needed of a store."""

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Log at most a thousand points in one request."""
        ...


class NodeRows:
    """The undelivered lines of a run's nodes.jsonl."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "nodes.jsonl"
        self._offset = 0
        self._run_id = ""
        self._nodes: dict[str, int] = {}  # milliseconds of their last points, by name
        self._latest_steps: Mapping[str, int] = {}

    def on_connected(self, run_id: str, latest_steps: Mapping[str, int]) -> None:
        """Learn what the store has of the run: the highest step of each metric."""
        if run_id != self._run_id:  # the first connection, or the store has lost the run
            self._offset, self._run_id, self._nodes = 0, run_id, {}
        self._latest_steps = {name: step for name, step in latest_steps.items() if name.startswith(PREFIX)}

    def upload(self, store: PointStore) -> None:
        """Upload the new lines. Raises: whatever the store raises."""
        while lines := self._read_lines():
            points: list[MetricPoint] = []
            num_bytes, nodes = 0, dict(self._nodes)
            for line in lines:
                new = find_missing_points(_choose_points(list(parse_points(line)), nodes), self._latest_steps)
                if points and len(points) + len(new) > MAX_POINTS:
                    break
                points += new
                num_bytes += len(line)
            for start in range(0, len(points), MAX_POINTS):
                store.log_points(points[start : start + MAX_POINTS])
            self._offset += num_bytes
            self._nodes = nodes

    def _read_lines(self) -> list[bytes]:
        """Return the next whole lines; none while there is no file, or none that can be read."""
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                chunk = stream.read(_CHUNK_BYTES)
        except OSError:
            return []
        return chunk[: chunk.rfind(b"\n") + 1].splitlines(keepends=True)


def _choose_points(points: list[MetricPoint], nodes: dict[str, int]) -> list[MetricPoint]:
    """Return a line's points and note its node; none if there are too many nodes already."""
    if not points:
        return []
    name, _, milliseconds, _ = points[0]
    node = name.partition(".")[2]  # no metric has a dot
    if node not in nodes and len(nodes) >= MAX_NODES:
        oldest = min(nodes, key=lambda other: nodes[other])
        if milliseconds - nodes[oldest] <= _SILENT_MS:
            return []
        del nodes[oldest]
    nodes[node] = max(milliseconds, nodes.get(node, milliseconds))
    return points


def parse_points(line: bytes) -> Iterator[MetricPoint]:
    """Yield the points of a line; none of a line that is damaged. A list has one number for each GPU."""
    try:
        row: dict[str, Any] = json.loads(line)
        step, milliseconds, node = int(row["step"]), round(row["time"] * 1000), str(row["node"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return
    for name, value in row.items():
        if name in _FACTS:
            continue
        numbers = value if isinstance(value, list) else [value]
        for index, number in enumerate(numbers):
            if isinstance(number, int | float):  # a GPU may tell some numbers only
                metric = name.replace("gpu_", f"gpu_{index}_", 1) if isinstance(value, list) else name
                yield f"{PREFIX}{metric}.{node}", float(number), milliseconds, step


def find_missing_points(points: Sequence[MetricPoint], latest_steps: Mapping[str, int]) -> list[MetricPoint]:
    """Return the points after the steps that the store has of their metrics."""
    return [point for point in points if point[3] > latest_steps.get(point[0], -1)]
