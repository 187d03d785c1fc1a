"""Runs side by side: settings that differ, results with the best marked, and their curves in one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.errors import ConfigError
from foveal.redact import redact
from foveal.report.charts import MAX_TRACES, PALETTE, Axes, Chart, Curve, draw_curves
from foveal.report.curves import Curves, read_curves
from foveal.report.page import render_page, write_page
from foveal.report.results import Result
from foveal.report.section import link_to
from foveal.report.settings import format_setting, list_kinds
from foveal.report.summary import Summary, summarize
from foveal.runs.record import RunRecord, read_run
from foveal.runs.results import is_lower_better

_ABSENT = "-"  # a setting that a run does not have
_NO_DIFFERENCES = ("run.dir", "run.pipeline", "run.fresh")
_MAX_CHARTS = 6


@dataclass(frozen=True)
class Row:
    """A row of a comparison: a cell for each run. best: positions of the best ones; none where all are equal."""

    name: str
    cells: tuple[str, ...]
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Runs side by side. names: unique. science, machine: settings that differ. facts: steps, duration, speed, state."""

    names: tuple[str, ...]
    summaries: tuple[Summary, ...]
    science: tuple[Row, ...]
    machine: tuple[Row, ...]
    results: tuple[Row, ...]
    facts: tuple[Row, ...]
    charts: dict[str, tuple[Chart, ...]] = field(default_factory=dict)  # by "step" and "images"
    links: tuple[str, ...] = ()


def compare_runs(folders: Sequence[Path], page: Path | None = None) -> Comparison:
    """Compare runs. page: where the comparison will be, if it is a page.

    Raises: ConfigError for fewer than two runs or more than a chart can show; CheckpointError for a folder that is no run.
    """
    unique = list({folder.resolve(): folder for folder in folders}.values())
    if not 2 <= len(unique) <= MAX_TRACES:
        raise ConfigError(f"a comparison takes 2 to {MAX_TRACES} different runs, and {len(unique)} are given")
    records = [read_run(folder) for folder in unique]
    curves = [read_curves(record) for record in records]
    names = name_runs(unique)
    summaries = tuple(summarize(record, found) for record, found in zip(records, curves, strict=True))
    science, machine = compare_settings(records, summaries)
    return Comparison(
        names,
        summaries,
        science,
        machine,
        compare_results(summaries),
        (
            Row("stage", tuple(summary.stage or _ABSENT for summary in summaries)),
            Row("state", tuple(summary.state for summary in summaries)),
            Row("steps", tuple(summary.steps_text or _ABSENT for summary in summaries)),
            Row("duration", tuple(summary.duration_text or _ABSENT for summary in summaries)),
            Row("images/s", tuple(summary.speed_text.removesuffix(" images/s") or _ABSENT for summary in summaries)),
            Row("attempts", tuple(str(summary.num_attempts) for summary in summaries)),
        ),
        {} if page is None else draw_comparison(names, records, curves),
        () if page is None else tuple(link_to(record.path, page) for record in records),
    )


def name_runs(folders: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each run: the shortest end of its path that tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = tuple(str(Path(*part[-length:])) for part in parts)
        if len(set(names)) == len(names):
            return names
    return tuple(str(folder) for folder in folders)


def compare_settings(
    records: Sequence[RunRecord], summaries: Sequence[Summary]
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return the settings that differ: science and machine. Of runs of several stages, those that all stages have."""
    kinds: dict[str, str] = {}
    for summary in summaries:
        kinds |= list_kinds(summary.stage)
    names = dict.fromkeys(name for record in records for name in record.settings)
    is_one_stage = len({summary.stage for summary in summaries}) == 1
    rows: dict[str, list[Row]] = {"science": [], "machine": []}
    for name in names:
        values: list[Any] = [record.settings.get(name, _ABSENT) for record in records]
        kind = _find_kind(name, kinds)
        # A machine setting that a run does not have is one that its version did not have.
        is_shared = _ABSENT not in values or (is_one_stage and kind == "science")
        if name in _NO_DIFFERENCES or not is_shared or all(value == values[0] for value in values):
            continue
        cells = tuple(_ABSENT if value is _ABSENT else format_setting(value) for value in values)
        rows[kind].append(Row(name, cells))
    return tuple(rows["science"]), tuple(rows["machine"])


def compare_results(summaries: Sequence[Summary]) -> tuple[Row, ...]:
    """Return the results that runs have, those of several runs first, with the best marked.

    Losses of different stages measure different things: none of them is the best.
    """
    is_one_stage = len({summary.stage for summary in summaries}) == 1
    found = [{result.name: result for result in summary.results} for summary in summaries]
    names = list(dict.fromkeys(name for results in found for name in results))
    rows = []
    for name in sorted(names, key=lambda name: -sum(name in results for results in found)):
        values = [results[name].value if name in results else None for results in found]
        cells = tuple(_result_cell(results[name]) if name in results else _ABSENT for results in found)
        is_chosen = any(name in results and results[name].is_chosen for results in found)
        is_comparable = not is_chosen and (is_one_stage or not is_lower_better(name))
        rows.append(Row(name, cells, find_best(name, values) if is_comparable else ()))
    return tuple(rows)


def find_best(name: str, values: Sequence[float | None]) -> tuple[int, ...]:
    """Return the positions of the best values of a metric; none if fewer than two are known, or all are equal."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < 2 or len(set(known)) == 1:
        return ()
    best = min(known) if is_lower_better(name) else max(known)
    return tuple(at for at, value in enumerate(values) if value == best)


def draw_comparison(
    names: Sequence[str], records: Sequence[RunRecord], curves: Sequence[Curves]
) -> dict[str, tuple[Chart, ...]]:
    """Return the charts of the metrics that at least two runs have, over steps and over images seen."""
    metrics = ["loss"] if sum("loss" in found.steps for found in curves) > 1 else []
    evaluated = dict.fromkeys(name for found in curves for name in found.evaluations)
    metrics += [name for name in evaluated if sum(name in found.evaluations for found in curves) > 1]
    charts: dict[str, tuple[Chart, ...]] = {}
    for axis in ("step", "images"):
        drawn = []
        for number, metric in enumerate(metrics[:_MAX_CHARTS]):
            lines = []
            for name, record, found, color in zip(names, records, curves, PALETTE, strict=False):
                series = found.steps.get(metric) if metric == "loss" else found.evaluations.get(metric)
                batch = record.settings.get("batch.global_size")
                scale = 1 if axis == "step" else batch if isinstance(batch, int) else 0
                if series is not None and scale:
                    lines.append(Curve(name, series.scale_steps(scale), metric != "loss", metric, color))
            if all(line.series.num_values < 2 for line in lines):
                continue  # the results say it
            axes = Axes(metric, x="step" if axis == "step" else "images seen", has_log_scale=True)
            drawn.append(draw_curves(f"{axis}-{number}", metric, lines, axes))
        charts[axis] = tuple(chart for chart in drawn if chart is not None)
    return charts


def write_comparison(comparison: Comparison, file: Path) -> None:
    """Write a comparison as a page. Raises: CheckpointError if the place cannot be written."""
    charts = {chart.key: chart for found in comparison.charts.values() for chart in found}
    title = redact(f"{', '.join(comparison.names)} · comparison")
    write_page(file, render_page("compare.html.j2", title, charts, {"comparison": comparison}))


def _find_kind(name: str, kinds: dict[str, str]) -> str:
    """Return the kind of a setting, or that of the section it lies in: the careful one, science, if it is unknown."""
    while name not in kinds and "." in name:
        name = name.rpartition(".")[0]
    return kinds.get(name, "science")


def _result_cell(result: Result) -> str:
    return f"{result.text} ({result.spread})" if result.spread else result.text
