"""From the reports of all ranks to a verdict: which nodes are bad, and whether it is the nodes at all."""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from foveal.doctor.report import RankReport
from foveal.errors import BadNodeError, ConfigError, StorageUnreachableError

_FACTS_TO_MATCH = ("version of ", "decoder", "commit", "device")
_MAX_CLOCK_SKEW_SECONDS = 5.0  # seconds between two clocks that make logs hard to read


@dataclass(frozen=True)
class Verdict:
    """Sentences for the user, the nodes that should not train with the first reason of each, and the exit code."""

    sentences: list[str]
    reasons: dict[str, str]
    exit_code: int

    @property
    def bad_nodes(self) -> list[str]:
        """The names of the nodes that should not train."""
        return list(self.reasons)


def judge_reports(
    reports: list[RankReport], silent_ranks: dict[int, tuple[str, str]], min_relative_rate: float
) -> Verdict:
    """Compare the ranks. ``silent``: node and sentence of the ranks that said nothing; slowest: share of the median rate."""
    faults: list[tuple[str, str, str]] = [(node, "node", said) for node, said in silent_ranks.values()]
    faults += [(each.node, kind, f"{each.node}: {said}") for each in reports for kind, said in each.faults]
    faults += _find_slow_ranks(reports, min_relative_rate) + _find_differing_ranks(reports) + _find_clock_skew(reports)
    nodes = list(dict.fromkeys(each.node for each in reports))
    wrong = {kind: {node for node, each, _ in faults if each == kind} - {""} for kind in ("node", "config", "reach")}
    shared = {kind for kind in ("config", "reach") if wrong[kind] >= set(nodes)}
    bad = wrong["node"].union(*(wrong[kind] for kind in ("config", "reach") if kind not in shared))
    unfit = bool(bad) or any(kind == "node" for _, kind, _ in faults)
    # Storage or a network that answers nobody is no node's fault, and may answer the next start.
    found = [("config" in shared, ConfigError), (unfit, BadNodeError), ("reach" in shared, StorageUnreachableError)]
    code = next((error.exit_code for there, error in found if there), 0)
    sentences = list(dict.fromkeys(said for _, _, said in faults))
    grave = [(node, said) for node, kind, said in faults if node in bad and kind != "note" and kind not in shared]
    return Verdict(
        sentences, {node: next(said for other, said in grave if other == node) for node in sorted(bad)}, code
    )


def _find_slow_ranks(reports: list[RankReport], min_relative_rate: float) -> list[tuple[str, str, str]]:
    """Ranks whose products are slow against the median of all others."""
    found = []
    for name in ("bf16_rate", "fp32_rate"):
        rated = [each for each in reports if name in each.facts]
        for each in rated:
            peers = [other.facts[name] for other in rated if other is not each]
            if peers and each.facts[name] < min_relative_rate * statistics.median(peers):
                found.append((each.node, "node", _describe_slow_rank(each, name, statistics.median(peers))))
    return found


def _describe_slow_rank(report: RankReport, name: str, median: float) -> str:
    rate = report.facts[name]
    return (
        f"{report.node}: rank {report.rank} multiplies {name[:4]} matrices at {rate / 1e12:.3g} TFLOP/s, {rate / median:.0%} of "
        f"its peers' median of {median / 1e12:.3g}"
    )


def _find_differing_ranks(reports: list[RankReport]) -> list[tuple[str, str, str]]:
    """Ranks that have something else than most; where two have as many, than the first."""
    found = []
    names = dict.fromkeys(name for each in reports for name in each.facts if name.startswith(_FACTS_TO_MATCH))
    for name in names:
        values = [each.facts.get(name) for each in reports]
        common: Any = Counter(values).most_common(1)[0][0]
        found += [
            (each.node, "node", f"{each.node}: the {name} is {each.facts.get(name)}, elsewhere it is {common}")
            for each in reports
            if each.facts.get(name) != common
        ]
    return found


def _find_clock_skew(reports: list[RankReport]) -> list[tuple[str, str, str]]:
    return [
        (
            each.node,
            "note",
            f"{each.node}: its clock is {each.facts['skew']:+.1f} s off that of rank 0; logs will not fit",
        )
        for each in reports
        if abs(each.facts.get("skew", 0.0)) > _MAX_CLOCK_SKEW_SECONDS
    ]
