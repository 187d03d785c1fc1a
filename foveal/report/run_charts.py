"""The charts of a run: loss, learning rate, evaluations, gradient norm, throughput, waits, ranks, nodes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from foveal.report.charts import MAX_TRACES, Axes, Chart, Curve, draw_curves
from foveal.report.curves import Curves
from foveal.report.events import Events, read_lines
from foveal.report.series import Series
from foveal.runs.record import RunRecord
from foveal.runs.results import is_lower_better

_TIMES = ("_ms", "_seconds", "_gigabytes", "_gib")
# Of a training step, and in a chart of their own or in none.
_NO_CURVES = ("lr", "grad_norm", "data_wait", "bad_samples", "slowest_rank", "slowest_data_wait", "images_per_second")
_NO_NODE_METRICS = ("step", "time", "node")
_NODE_METRICS = (  # those that say most of a training, in this order
    "gpu_utilization_percentage",
    "cpu_utilization_percentage",
    "gpu_memory_usage_percentage",
    "system_memory_usage_percentage",
    "disk_read_megabytes_per_second",
    "network_receive_megabytes_per_second",
)
# Endings of metrics of nodes, the longest first, and their units.
_NODE_UNITS = {"megabytes_per_second": "MB/s", "megabytes": "MB", "percentage": "%", "watts": "W"}
_MAX_NODE_METRICS, _MAX_READ_NODE_METRICS = 6, 32
_MAX_NODE_BYTES = 64 << 20  # of nodes.jsonl: days of a hundred nodes


def draw_training(curves: Curves, events: Events) -> list[Chart]:
    """Return the charts of what was learned: loss, evaluation metrics, other metrics of steps, rate, gradient norm."""
    steps, evaluations = curves.steps, curves.evaluations
    losses = [Curve(name, steps[name]) for name in _sorted(steps, is_loss=True)]
    losses += [Curve(name, evaluations[name], is_evaluation=True) for name in _sorted(evaluations, is_loss=True)]
    charts = [
        draw_curves("loss", "Loss", losses, _log_axes("loss", losses, ratio=4), events, has_lane=True),
        *_evaluation_charts(evaluations, events),
        *_step_metric_charts(steps, events),
        draw_curves(
            "lr", "Learning rate", _pick(steps, "lr"), Axes("learning rate", tickformat=".3~g", from_zero=True), events
        ),
        _draw_norm(steps, events),
    ]
    return [chart for chart in charts if chart is not None]


def draw_throughput(record: RunRecord, curves: Curves, events: Events) -> list[Chart]:
    """Return the charts of how fast the run went and what it waited for."""
    steps = curves.steps
    waits = [Curve(name, steps[name]) for name in ("data_wait", "slowest_data_wait") if name in steps]
    ranks = [Curve(name, steps[name]) for name in ("slowest_step_seconds", "median_step_seconds") if name in steps]
    charts = [
        draw_curves(
            "speed", "Images per second", _pick(steps, "images_per_second"), Axes("images/s", from_zero=True), events
        ),
        draw_curves(
            "wait",
            "Share of time spent waiting for data",
            waits,
            Axes("share", tickformat=".0%", from_zero=True),
            events,
        ),
        draw_curves(
            "ranks", "Seconds of a step before it meets the other ranks", ranks, Axes("seconds", from_zero=True), events
        ),
        *_node_charts(record),
    ]
    return [chart for chart in charts if chart is not None]


def summarize_stragglers(record: RunRecord) -> tuple[tuple[str, ...], ...]:
    """Return (rank, host, reports in which it was the slowest, share of all reports) of the most frequent ones."""
    slowest: dict[tuple[int, str], int] = {}
    worst: dict[str, object] = {}
    reports = 0
    for entry in [*_straggler_lines(record), {"step": None, "step_seconds": 0.0}]:
        if worst and entry["step"] != worst["step"]:
            reports += 1
            place = (int(str(worst.get("rank", 0))), str(worst.get("host", "")))
            slowest[place] = slowest.get(place, 0) + 1
            worst = {}
        if not worst or float(str(entry["step_seconds"])) > float(str(worst["step_seconds"])):
            worst = dict(entry)
    ranked = sorted(slowest.items(), key=lambda pair: -pair[1])[:8]
    return tuple((str(rank), host, f"{count:,}", f"{count / reports:.0%}") for (rank, host), count in ranked)


def _straggler_lines(record: RunRecord) -> Iterable[dict[str, object]]:
    for entry in read_lines(record.path / "stragglers.jsonl"):
        if isinstance(entry.get("step_seconds"), int | float) and type(entry.get("rank")) is int and "step" in entry:
            yield entry


def _evaluation_charts(evaluations: dict[str, Series], events: Events) -> list[Chart | None]:
    names = [name for name in _sorted(evaluations, is_loss=False) if not name.endswith(_TIMES)]
    shares = [name for name in names if _is_share(evaluations[name])]
    others = [name for name in names if name not in shares and evaluations[name].num_values > 1]
    if all(evaluations[name].num_values == 1 for name in shares):
        shares = []  # one evaluation: the results say it
    charts = [
        draw_curves(
            f"evaluation-{number}",
            "Evaluation" if number == 0 else f"Evaluation, more metrics ({number + 1})",
            [Curve(name, evaluations[name], is_evaluation=True) for name in group],
            Axes("share", tickformat=".0%"),
            events,
        )
        for number, group in enumerate(_in_groups(shares)[:3])
    ]
    return charts + [
        draw_curves(
            f"evaluation-other-{number}", name, [Curve(name, evaluations[name], is_evaluation=True)], Axes(name), events
        )
        for number, name in enumerate(others[:4])
    ]


def _step_metric_charts(steps: dict[str, Series], events: Events) -> list[Chart | None]:
    names = [
        name
        for name in _sorted(steps, is_loss=False)
        if name not in _NO_CURVES and not name.endswith((*_TIMES, "_applied")) and steps[name].num_values > 1
    ]
    groups = _in_groups([name for name in names if _is_share(steps[name])])[:2]
    return [
        draw_curves(
            f"steps-{number}",
            group[0] if len(group) == 1 else "In training",
            [Curve(name, steps[name]) for name in group],
            Axes("value"),
            events,
        )
        for number, group in enumerate(groups)
    ]


def _draw_norm(steps: dict[str, Series], events: Events) -> Chart | None:
    norms = _pick(steps, "grad_norm")
    return draw_curves("norm", "Gradient norm", norms, _log_axes("norm", norms, ratio=20), events)


def _node_charts(record: RunRecord) -> list[Chart | None]:
    """Return a chart for each of the most telling metrics of nodes.jsonl, with a curve for each node."""
    metrics: dict[str, dict[str, Series]] = {}
    for entry in _node_lines(record.path / "nodes.jsonl"):
        for name, value in entry.items():
            number = None if name in _NO_NODE_METRICS else _mean_of(value)
            if number is None or (name not in metrics and len(metrics) >= _MAX_READ_NODE_METRICS):
                continue
            metrics.setdefault(name, {}).setdefault(str(entry.get("node", "")), Series()).add(entry["step"], number)
    telling = sorted(
        metrics, key=lambda name: _NODE_METRICS.index(name) if name in _NODE_METRICS else len(_NODE_METRICS)
    )
    telling = [name for name in telling if any(map(_is_in_use, metrics[name].values()))]
    return [
        draw_curves(
            f"node-{number}",
            f"Nodes: {_describe_node_metric(name)}",
            [Curve(node, series) for node, series in metrics[name].items()],
            Axes(_describe_node_metric(name), from_zero=True),
        )
        for number, name in enumerate(telling[:_MAX_NODE_METRICS])
    ]


def _is_in_use(series: Series) -> bool:
    """Whether a node's metric was ever more than 0: a network at rest is not drawn."""
    return series.highest is not None and series.highest[1] > 0


def _describe_node_metric(name: str) -> str:
    """Return a metric's name in words, with its unit."""
    unit = next((unit for unit in _NODE_UNITS if name.endswith(unit)), None)
    words = name.removesuffix(unit or "").replace("_", " ").strip()
    return words if unit is None else f"{words} ({_NODE_UNITS[unit]})"


def _node_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the nodes that are drawn, the first that are seen, from the end of a file that may be very long.

    The lines of other nodes, of which there may be hundreds, are not parsed.
    """
    names: dict[str, bytes] = {}  # with the name as JSON has it

    def is_wanted(line: bytes) -> bool:
        return len(names) < MAX_TRACES or any(name in line for name in names.values())

    for entry in read_lines(file, _MAX_NODE_BYTES, is_wanted):
        node = str(entry.get("node", ""))
        if type(entry.get("step")) is int and (node in names or len(names) < MAX_TRACES):
            names.setdefault(node, json.dumps(node, ensure_ascii=False).encode())
            yield entry


def _mean_of(value: Any) -> float | None:
    """Return a number, or the mean of a list with one for each GPU; None for anything else."""
    values = value if isinstance(value, list) else [value]
    numbers = [float(item) for item in values if type(item) in (int, float)]
    return sum(numbers) / len(numbers) if numbers else None


def _pick(steps: dict[str, Series], name: str) -> list[Curve]:
    return [Curve(name, steps[name])] if name in steps else []


def _sorted(metrics: dict[str, Series], *, is_loss: bool) -> list[str]:
    """Return the names of losses, or of the others; ``loss`` first, then the order of logging."""
    names = [name for name in metrics if is_lower_better(name) == is_loss]
    return sorted(names, key=lambda name: name not in ("loss", "val_loss"))


def _in_groups(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + MAX_TRACES] for start in range(0, len(names), MAX_TRACES)]


def _is_share(series: Series) -> bool:
    return series.lowest is not None and series.highest is not None and series.lowest[1] >= 0 and series.highest[1] <= 1


def _log_axes(title: str, curves: Sequence[Curve], ratio: float) -> Axes:
    """Return axes that can be logarithmic, and are where the highest value is ``ratio`` times the lowest."""
    lows = [curve.series.lowest[1] for curve in curves if curve.series.lowest is not None]
    highs = [curve.series.highest[1] for curve in curves if curve.series.highest is not None]
    span = max(highs) / min(lows) if lows and min(lows) > 0 else 1.0
    return Axes(title, is_log=span > ratio, has_log_scale=True, has_decades_only=span > 30)
