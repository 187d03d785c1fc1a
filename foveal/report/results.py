"""The results of a run: numbers with their spread, classes, confusions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.atomic import read_json
from foveal.errors import CheckpointError
from foveal.report.charts import Chart, escape_text
from foveal.report.text import format_number
from foveal.runs.record import RunRecord
from foveal.runs.results import is_chosen, is_lower_better

_SPREAD = ("_mean", "_std", "_lowest", "_highest")
_MAX_TILES = 4
_MAX_MATRIX_CLASSES = 100
_MAX_CLASS_ROWS = 1000


@dataclass(frozen=True)
class Result:
    """A result as text. spread: over seeds or folds, "" for a single number."""

    name: str
    value: float
    text: str
    spread: str = ""

    @property
    def is_chosen(self) -> bool:
        """Whether the number is a choice, such as of a learning rate, and no result."""
        return is_chosen(self.name)


@dataclass(frozen=True)
class Evaluation:
    """What evaluation.json says. columns, rows: the table of classes, the worst first. confusions: in sentences.

    unit: what the confusion matrix counts: images, boxes or pixels.
    """

    step: int
    split: str
    num_images: int
    unit: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left_out: int
    confusion: Chart | None
    confusions: tuple[str, ...]


def group_results(results: Mapping[str, float]) -> tuple[Result, ...]:
    """Return the results; a number and its mean, deviation and range over seeds or folds are one."""
    grouped: dict[str, Result] = {}
    for name, value in results.items():
        stem = next((name.removesuffix(end) for end in _SPREAD if name.endswith(end)), name)
        low, high = results.get(f"{stem}_lowest"), results.get(f"{stem}_highest")
        if low is None or high is None:
            stem = name
        if stem in grouped:
            continue
        if low is None or high is None:
            grouped[stem] = Result(stem, value, format_number(value))
            continue
        center = results.get(f"{stem}_mean", results.get(stem, (low + high) / 2))
        deviation = results.get(f"{stem}_std")
        spread = f"{format_number(low)} to {format_number(high)}"
        spread += f", std {format_number(deviation)}" if deviation is not None else ""
        grouped[stem] = Result(stem, center, format_number(center), spread)
    return tuple(grouped.values())


def choose_tiles(results: Sequence[Result]) -> tuple[Result, ...]:
    """Return the results of a headline: those with a spread, then those of evaluations, then losses."""
    candidates = [result for result in results if not result.is_chosen and "holdout" not in result.name]
    ranked = sorted(
        candidates,
        key=lambda result: (
            not result.spread,
            result.name.startswith("train_"),
            is_lower_better(result.name),
            not result.name.startswith("val"),
        ),
    )
    return tuple(ranked[:_MAX_TILES])


def read_evaluation(record: RunRecord) -> Evaluation | None:
    """Return what the last evaluation said of classes; None without one. Raises: CheckpointError for a damaged file."""
    file = record.path / "evaluation.json"
    if not file.exists():
        return None
    try:
        facts = read_json(file)
        classes = [str(name) for name in facts.get("classes") or ()]
        unit = str(facts.get("unit") or "images")
        columns, rows = _tabulate_classes(facts.get("per_class") or [])
        matrix = facts.get("confusion") or []
        return Evaluation(
            int(facts.get("step") or 0),
            str(facts.get("split") or ""),
            int(facts.get("num_images") or 0),
            unit,
            columns,
            tuple(rows[:_MAX_CLASS_ROWS]),
            max(0, len(rows) - _MAX_CLASS_ROWS),
            draw_confusion(classes, matrix, unit),
            tuple(_list_confusions(facts.get("most_confused")) or _describe_confusions(classes, matrix)),
        )
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from None


def draw_confusion(classes: Sequence[str], matrix: Sequence[Sequence[int]], unit: str = "images") -> Chart | None:
    """Return the confusion matrix, a row for each true class, as shares of the row; None for none or too many classes."""
    if not matrix or len(matrix) > _MAX_MATRIX_CLASSES or len(matrix) != len(classes):
        return None
    shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
    names = [escape_text(name) for name in classes]
    has_counts = len(classes) <= 20 and max(map(max, matrix)) < 100_000
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": shares,
        "customdata": [list(row) for row in matrix],
        # A number first: two classes of one name are two rows.
        "x": list(range(len(names))),
        "y": list(range(len(names))),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(47,127,209,0.04)"], [0.5, "rgba(47,127,209,0.55)"], [1, "rgba(47,127,209,0.9)"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": [[f"{value:,}" if value else "" for value in row] for row in matrix] if has_counts else None,
        "texttemplate": "%{text}" if has_counts else None,
        "hovertemplate": "true %{y}, predicted %{x}: %{customdata} "
        + escape_text(unit)
        + ", %{z:.1%} of the class<extra></extra>",
    }
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [_shorten(name) for name in names]}
    is_crowded = len(names) > 40
    layout = {
        "margin": {"l": 16, "r": 16, "t": 12, "b": 16},
        "xaxis": {"title": {"text": "predicted"}, "automargin": True, "showgrid": False, "zeroline": False, **ticks},
        "yaxis": {
            "title": {"text": "true"},
            "automargin": True,
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            **ticks,
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
    if is_crowded:
        layout["xaxis"] |= {"showticklabels": False}
        layout["yaxis"] |= {"showticklabels": False}
    sentence = " ".join(_describe_confusions(classes, matrix)) or "No image is confused."
    trace = {name: value for name, value in trace.items() if value is not None}
    return Chart(
        "confusion", "Confusion matrix", sentence, (trace,), layout, height=min(820, max(320, 150 + 26 * len(names)))
    )


def _tabulate_classes(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of the table of classes, the worst first by the first number that is no count."""
    if not entries:
        return (), []
    columns = tuple(dict.fromkeys(str(name) for entry in entries for name in entry))
    numbers = [name for name in columns if name not in ("class", "support")]
    if numbers:
        entries = sorted(entries, key=lambda entry: _sort_key(entry.get(numbers[0])))
    rows = [
        tuple("" if entry.get(name) is None else format_number(entry.get(name)) for name in columns)
        for entry in entries
    ]
    return columns, rows


def _sort_key(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else math.inf


def _describe_confusions(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> list[str]:
    """Return the five most frequent confusions as sentences."""
    pairs = [
        (count, true, predicted)
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    top = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:5]
    return [
        f"{classes[true]} taken for {classes[predicted]}: {count:,} of {sum(matrix[true]):,}."
        for count, true, predicted in top
    ]


def _list_confusions(pairs: Any) -> list[str]:
    """Return the first five pairs of ``most_confused`` as sentences."""
    return [
        f"{pair['class']} taken for {pair['predicted']}: {pair['count']:,} of {pair['support']:,}."
        for pair in (pairs or [])[:5]
    ]


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
