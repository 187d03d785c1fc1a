"""The table of `foveal doctor`: one line per node."""

from collections.abc import Callable
from typing import Any

from foveal.doctor.report import RankReport


def format_node_table(
    reports: list[RankReport], silent_ranks: dict[int, tuple[str, str]], bad_nodes: list[str]
) -> list[str]:
    """Return the table's lines. Of several ranks of a node the worst value counts."""
    nodes = dict.fromkeys([*(report.node for report in reports), *(node for node, _ in silent_ranks.values())])
    rows = [("node", *(title for title, _, _ in _COLUMNS), "verdict")]
    for node in nodes:
        node_reports = [report for report in reports if report.node == node]
        cells = tuple(_format_cell(node_reports, fact, format_value) for _, fact, format_value in _COLUMNS)
        rows.append((node, *cells, "BAD" if node in bad_nodes else "fine"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _format_cell(node_reports: list[RankReport], fact: str, format_value: Callable[[Any], str]) -> str:
    if fact == "ranks":
        return str(len(node_reports)) if node_reports else "-"
    values = [report.facts[fact] for report in node_reports if fact in report.facts]
    if not values:
        return "-"
    worst = max(values, key=abs) if fact == "skew" else min(values)
    return format_value(worst)


# Title, fact and format of each column.
_COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("ranks", "ranks", str),
    ("device", "device", str),
    ("bf16 TFLOP/s", "bf16_rate", lambda rate: f"{rate / 1e12:.3g}"),
    ("fp32 TFLOP/s", "fp32_rate", lambda rate: f"{rate / 1e12:.3g}"),
    ("shm GB", "shm_free", lambda size: f"{size / 1e9:.2f}"),
    ("disk GB", "disk_free", lambda size: f"{size / 1e9:.1f}"),
    ("write MB/s", "write_speed", lambda speed: f"{speed / 1e6:.0f}"),
    ("files", "files", str),
    ("clock s", "skew", lambda seconds: f"{seconds:+.2f}"),
    ("commit", "commit", lambda commit: commit[:8]),
]
