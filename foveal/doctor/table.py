"""One line per node."""

from collections.abc import Callable
from typing import Any

from foveal.doctor.report import RankReport


def format_node_table(
    reports: list[RankReport], silent_ranks: dict[int, tuple[str, str]], bad_nodes: list[str]
) -> list[str]:
    """The table: of several ranks of a node, the worst counts."""
    nodes = dict.fromkeys([*(each.node for each in reports), *(node for node, _ in silent_ranks.values())])
    rows = [("node", *(title for title, _, _ in _COLUMNS), "verdict")]
    for node in nodes:
        here = [each for each in reports if each.node == node]
        cells = tuple(_format_cell(here, name, shown) for _, name, shown in _COLUMNS)
        rows.append((node, *cells, "BAD" if node in bad_nodes else "fine"))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _format_cell(node_reports: list[RankReport], name: str, shown: Callable[[Any], str]) -> str:
    if name == "ranks":
        return str(len(node_reports)) if node_reports else "-"
    values = [each.facts[name] for each in node_reports if name in each.facts]
    if not values:
        return "-"
    worst = max(values, key=abs) if name == "skew" else min(values)
    return shown(worst)


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
