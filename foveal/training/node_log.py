"""RUN/nodes.jsonl: the use of every node, which its first rank samples and rank 0 writes.

A line is one node at one write of metrics: ``step``, ``time`` (unix seconds), ``node`` and the numbers of
``meters.node_usage``. A roll-back or a resume repeats steps, and so lines.
"""

import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog
from foveal.distributed.world import World
from foveal.training.config import LogConfig
from foveal.training.meters.node_usage import NodeMeter

NODES_FILE = "nodes.jsonl"
_MAX_PENDING_BYTES = 1 << 20  # lines that wait in memory for a full disk; older ones are dropped
_UNSUPPORTED = re.compile(r"[^\w.\-]")  # in a part of a metric's name

Gather = Callable[[Any], list[Any]]
_log = logging.getLogger(__name__)


class NodeLog:
    """The nodes of a run. ``meter``: on the first rank of a node; None on the others, and with log.node_metrics=false."""

    def __init__(self, file: Path | None = None, meter: NodeMeter | None = None, host: str = "") -> None:
        """``file``: on rank 0."""
        self._log = None if file is None else AppendLog(file)
        self._meter, self._host = meter, _UNSUPPORTED.sub("_", host)
        self._num_nodes = 1
        self._reports: list[tuple[int, dict[str, Any]]] = []  # rank, its node's line

    def share_exchange(self, gather: Gather) -> Gather:
        """Return ``gather``, in whose message this node's numbers travel too: no collective of their own."""

        def gather_both(record: Any) -> list[Any]:
            usage = None if self._meter is None else self._meter.pop(self._num_nodes)
            pairs = gather((record, None if usage is None else {"node": self._host} | dict(usage)))
            self._reports = [(rank, report) for rank, (_, report) in enumerate(pairs) if report is not None]
            self._num_nodes = max(self._num_nodes, len(self._reports))
            return [record for record, _ in pairs]

        return gather_both

    def write(self, step: int) -> None:
        """Write what the last exchange brought, on rank 0. An error is one warning, and the end of the file."""
        reports, self._reports = self._reports, []
        if self._log is None or not reports:
            return
        lines = [{"step": step, "time": round(time.time(), 3)} | report for report in _name_apart(reports)]
        try:
            if len(self._log.pending) > _MAX_PENDING_BYTES:
                self._log.pending = b""
            self._log.append_json_lines(lines)
        except OSError as error:
            _log.warning("%s is not written any more: %s", NODES_FILE, error)
            self._log = None

    def close(self) -> None:
        """End the meter; a full disk's lines are not waited for."""
        if self._meter is not None:
            self._meter.close()


def open_node_log(run_dir: Path, world: World, cfg: LogConfig) -> NodeLog:
    """Open the log of a run, and begin to sample on the first rank of each node."""
    if not cfg.node_metrics:
        return NodeLog()
    meter = NodeMeter() if world.local_rank == 0 else None
    if meter is not None:
        try:
            meter.start()
        except RuntimeError as error:  # no more threads
            _log.warning("the use of this node is not recorded (%s)", error)
            meter = None
    return NodeLog(run_dir / NODES_FILE if world.rank == 0 else None, meter, socket.gethostname())


def _name_apart(reports: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the reports, with the rank in the names of nodes that call themselves the same."""
    names = [report["node"] for _, report in reports]
    return [
        report | {"node": f"{report['node']}-rank{rank}"} if names.count(report["node"]) > 1 else report
        for rank, report in reports
    ]
