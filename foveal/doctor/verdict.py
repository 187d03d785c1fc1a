"""Derive a verdict from all ranks' reports: the bad nodes, or an error that all nodes share."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from foveal.distributed.rendezvous import format_ranks
from foveal.doctor.report import RankReport
from foveal.errors import BadNodeError, ConfigError, StorageUnreachableError

_FACTS_TO_MATCH = ("version of ", "decoder", "commit", "device")
_MAX_CLOCK_SKEW_SECONDS = 5.0  # a larger difference makes logs hard to compare


@dataclass(frozen=True)
class Verdict:
    """Sentences for the user, the first reason of each bad node by its name, and the exit code."""

    sentences: list[str]
    reasons: dict[str, str]
    exit_code: int

    @property
    def bad_nodes(self) -> list[str]:
        """The names of the nodes that should not train."""
        return list(self.reasons)


def judge_reports(
    reports: list[RankReport], silent_ranks: dict[int, tuple[str, str]], min_relative_matmul_rate: float
) -> Verdict:
    """Compare the ranks' reports.

    ``silent_ranks``: node and sentence of each rank without a report. ``min_relative_matmul_rate``: lowest accepted
    rate of matrix products, as a fraction of the other ranks' median.
    """
    faults: list[tuple[str, str, str]] = [(node, "node", sentence) for node, sentence in silent_ranks.values()]
    for report in reports:
        faults += [(report.node, kind, f"{report.node}: {sentence}") for kind, sentence in report.faults]
    faults += _find_slow_ranks(reports, min_relative_matmul_rate) + _find_differing_ranks(reports)
    faults += _find_shared_gpus(reports) + _find_clock_skew(reports)
    nodes = {report.node for report in reports}
    faulty_nodes: dict[str, set[str]] = {"node": set(), "config": set(), "reach": set()}
    for node, kind, _ in faults:
        if node and kind in faulty_nodes:
            faulty_nodes[kind].add(node)
    # A fault that all nodes share is no node's fault.
    shared = {kind for kind in ("config", "reach") if faulty_nodes[kind] >= nodes}
    bad_nodes = faulty_nodes["node"].union(*(faulty_nodes[kind] for kind in ("config", "reach") if kind not in shared))
    if "config" in shared:
        exit_code = ConfigError.exit_code
    elif bad_nodes or any(kind == "node" for _, kind, _ in faults):
        exit_code = BadNodeError.exit_code
    else:  # unreachable storage or network may answer at the next start
        exit_code = StorageUnreachableError.exit_code if "reach" in shared else 0
    reasons: dict[str, str] = {}
    for node in sorted(bad_nodes):
        reasons[node] = next(
            sentence
            for faulty_node, kind, sentence in faults
            if faulty_node == node and kind != "note" and kind not in shared
        )
    return Verdict(list(dict.fromkeys(sentence for _, _, sentence in faults)), reasons, exit_code)


def _find_slow_ranks(reports: list[RankReport], min_relative_rate: float) -> list[tuple[str, str, str]]:
    """Return a fault for each rank whose matrix products are slow compared with the median of the other ranks."""
    faults = []
    for fact in ("bf16_rate", "fp32_rate"):
        measured = [report for report in reports if fact in report.facts]
        for report in measured:
            peer_rates = [peer.facts[fact] for peer in measured if peer is not report]
            if peer_rates and report.facts[fact] < min_relative_rate * statistics.median(peer_rates):
                faults.append((report.node, "node", _describe_slow_rank(report, fact, statistics.median(peer_rates))))
    return faults


def _describe_slow_rank(report: RankReport, fact: str, median: float) -> str:
    rate = report.facts[fact]
    return (
        f"{report.node}: rank {report.rank} multiplies {fact[:4]} matrices at {rate / 1e12:.3g} TFLOP/s, "
        f"{rate / median:.0%} of its peers' median of {median / 1e12:.3g}"
    )


def _find_differing_ranks(reports: list[RankReport]) -> list[tuple[str, str, str]]:
    """Return a fault for each rank with another version, commit or device than most; at a tie, than the first."""
    faults = []
    names = dict.fromkeys(name for report in reports for name in report.facts if name.startswith(_FACTS_TO_MATCH))
    for name in names:
        values = [report.facts.get(name) for report in reports]
        common: Any = Counter(values).most_common(1)[0][0]
        faults += [
            (report.node, "node", f"{report.node}: the {name} is {report.facts.get(name)}, elsewhere it is {common}")
            for report in reports
            if report.facts.get(name) != common
        ]
    return faults


def _find_shared_gpus(reports: list[RankReport]) -> list[tuple[str, str, str]]:
    """Return a fault for each GPU that several ranks of a node have."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for report in reports:
        if uuid := report.facts.get("gpu_uuid"):
            ranks.setdefault((report.node, uuid), []).append(report.rank)
    return [
        (
            node,
            "config",
            f"{node}: {format_ranks(sharing)} are on one GPU, {uuid}: start as many tasks per node as GPUs",
        )
        for (node, uuid), sharing in ranks.items()
        if len(sharing) > 1
    ]


def _find_clock_skew(reports: list[RankReport]) -> list[tuple[str, str, str]]:
    return [
        (
            report.node,
            "note",
            f"{report.node}: its clock is {report.facts['skew']:+.1f} s off that of rank 0; log times will not match",
        )
        for report in reports
        if abs(report.facts.get("skew", 0.0)) > _MAX_CLOCK_SKEW_SECONDS
    ]
