"""The runs inside a run: trials of a comparison, folds of a cross-validation."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.atomic import read_json
from foveal.errors import CheckpointError
from foveal.report.charts import Chart, draw_dots
from foveal.report.summary import STATE_WORDS
from foveal.report.text import format_duration, format_number
from foveal.runs.record import RunRecord, state_after_end
from foveal.runs.results import is_lower_better, is_result
from foveal.training.lease import list_attempts

_MAX_RUNS = 300
_MAX_COLUMNS = 5
_NUMBER_AT_END = re.compile(r"-(?:seed|fold|repeat)?\d.*$")


@dataclass(frozen=True)
class NestedRuns:
    """The runs inside a run as a table and a chart. metric: the one of the chart. num_left_out: rows beyond the limit."""

    noun: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    chart: Chart | None
    num_left_out: int


def read_nested(record: RunRecord) -> NestedRuns | None:
    """Return the trials or folds of a run; None for a run without."""
    folders = record.nested
    if not folders:
        return None
    facts = {folder: _read_facts(folder) for folder in folders[:_MAX_RUNS]}
    names = list(dict.fromkeys(name for _, results, _ in facts.values() for name in results))
    # What a trial was chosen by, then the evaluation; a loss is the last.
    names = sorted(names, key=lambda name: (is_lower_better(name), not name.startswith(("val", "fold"))))[:_MAX_COLUMNS]
    rows = tuple(
        (folder.name, state, *(format_number(results[name]) if name in results else "" for name in names), duration)
        for folder, (state, results, duration) in facts.items()
    )
    groups: dict[str, list[tuple[str, float]]] = {}
    if names:
        for folder, (_, results, _) in facts.items():
            if names[0] in results:
                groups.setdefault(_group_of(folder.name), []).append((folder.name, results[names[0]]))
    noun = "trials" if folders[0].parent.name == "trials" else "folds"
    chart = draw_dots("nested", f"{names[0]} of the {noun}", groups, names[0]) if names else None
    columns = (noun.removesuffix("s"), "state", *names, "time")
    return NestedRuns(noun, columns, rows, chart, len(folders) - len(facts))


def _read_facts(folder: Path) -> tuple[str, dict[str, float], str]:
    """Return the state, the results and the duration of a nested run."""
    try:
        finished = read_json(folder / "finished.json") if (folder / "finished.json").exists() else {}
        if finished:
            return (
                "finished",
                _pick_results(finished.get("summary") or {}),
                format_duration(finished.get("total_seconds")),
            )
        attempts = list_attempts(folder)
        code = attempts[-1].exit_code if attempts else None
        state = STATE_WORDS[state_after_end(code)] if code is not None else "not finished"
    except (CheckpointError, OSError):
        return "cannot be read", {}, ""
    return state, {}, ""


def _pick_results(summary: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in summary.items() if is_result(name, value) and math.isfinite(value)}


def _group_of(name: str) -> str:
    """Return what the runs of an arm share: the name before the seed, or "folds" for the folds of one seed."""
    return _NUMBER_AT_END.sub("", name) if _NUMBER_AT_END.search(name) else name
