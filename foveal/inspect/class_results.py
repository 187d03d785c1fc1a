"""A picture of the results of every class, the worst first; of many classes the worst ones and how all are distributed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from foveal.inspect.chart import (
    BLUE,
    INK,
    ORANGE,
    SMALL_SIZE,
    VERMILION,
    add_axes,
    add_legend,
    hide_tick_marks,
    new_figure,
    set_ticks,
    to_image,
    write_text,
)
from foveal.inspect.picture import Picture

_MAX_ROWS = 30  # classes that are drawn; of more, the worst
_ROW_HEIGHT = 0.23  # inches
_NAMES = {"recall": "recall", "precision": "precision", "iou": "IoU", "ap": "AP", "ap_50": "AP at IoU 0.5"}
_NAMES |= {"average_precision": "average precision"}
_NUM_DESCRIBED = 3  # classes in the alternative text
_COLOURS = (BLUE, VERMILION, ORANGE)


def draw_class_results(per_class: Sequence[Mapping[str, Any]], *, unit: str, subject: str) -> Picture | None:
    """Draw the rows of classes: the first number after ``class`` and ``support`` as bars, the others as marks.

    Classes without that number, which have no ``support``, are left out. Numbers are in [0, 1] or null. ``unit``: what
    ``support`` counts; ``subject``: which evaluation this is. None: there is nothing to draw.
    """
    metrics = [name for name in (per_class[0] if per_class else {}) if name not in ("class", "support")][:3]
    if not metrics:
        return None
    rows = [row for row in per_class if _is_number(row[metrics[0]])]
    rows.sort(key=lambda row: row[metrics[0]])  # stable: equal ones stay in the order of the classes
    if not rows:
        return None
    shown = rows[:_MAX_ROWS]
    figure = new_figure(7.5, max(1.6, 0.9 + _ROW_HEIGHT * len(shown) + (1.3 if len(rows) > _MAX_ROWS else 0)))
    _draw_rows(figure, shown, metrics, unit, with_histogram=rows if len(rows) > _MAX_ROWS else ())
    name = _NAMES.get(metrics[0], metrics[0])
    worst = ", ".join(f"{row['class']} {_percent(row[metrics[0]])}" for row in rows[:_NUM_DESCRIBED])
    mean = float(np.mean([row[metrics[0]] for row in rows]))
    which = "1 class" if len(rows) == 1 else f"{len(rows)} classes, the worst first"
    if len(rows) > len(shown):
        which = f"the {len(shown)} worst of {len(rows):,} classes"
    missing = len(per_class) - len(rows)
    absent = f" Classes left out, for want of {unit}: {missing:,}." if missing else ""
    others = "".join(f", {_NAMES.get(metric, metric)}" for metric in metrics[1:])
    return Picture(
        to_image(figure),
        "Results by class",
        f"{name[0].upper()}{name[1:]}{others} of {which}; {subject}. "
        f"Mean {name} {_percent(mean)}; worst: {worst}.{absent}",
    )


def _draw_rows(
    figure: Figure,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    unit: str,
    with_histogram: Sequence[Mapping[str, Any]],
) -> None:
    """Draw a row per class, and above them how the first number is distributed over all classes."""
    grid = figure.add_gridspec(2, 1, height_ratios=[1.0, _ROW_HEIGHT * len(rows)]) if with_histogram else None
    first = _NAMES.get(metrics[0], metrics[0])
    if grid is not None:
        above = add_axes(figure, grid[0], x=f"{first} of all {len(with_histogram):,} classes", y="classes")
        values = np.array([row[metrics[0]] for row in with_histogram], dtype=np.float64)
        above.hist(values, bins=np.linspace(0, 1, 41).tolist(), color=BLUE)
        above.set_xlim(0, 1)
        above.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes = add_axes(figure, *(() if grid is None else (grid[1],)), grid="x")
    positions = np.arange(len(rows))
    for number, metric in enumerate(metrics):
        values = np.array([_to_float(row[metric]) for row in rows])
        label, colour = _NAMES.get(metric, metric), _COLOURS[number]
        if number == 0:
            axes.barh(positions, values, height=0.62, color=colour, label=label)
        else:
            marker = "D" if number == 1 else "o"
            axes.scatter(values, positions, s=22, color=colour, marker=marker, label=label, zorder=3, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    set_ticks(axes, "y", positions.tolist(), [row["class"] for row in rows], size=SMALL_SIZE + 0.5)
    hide_tick_marks(axes)
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right"}
    for position, row in zip(positions.tolist(), rows, strict=True):
        write_text(axes, 1.13, position, f"{row['support']:,}", **beside)
    write_text(axes, 1.13, -0.9, unit, **beside | {"va": "bottom"})
    if len(metrics) > 1:
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        ordered = [_NAMES.get(metric, metric) for metric in metrics]
        add_legend(
            axes,
            handles=[handles[name] for name in ordered],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(metrics),
            borderaxespad=0.2,
        )
    else:
        axes.set_xlabel(first, color=INK)


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _to_float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
