"""A picture of a confusion matrix: correct predictions in blue, mistakes in orange on a scale of their own. K classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from foveal.inspect.chart import INK, SMALL_SIZE, add_axes, hide_tick_marks, new_figure, set_ticks, to_image
from foveal.inspect.picture import Picture

# Cells are opaque, so that numbers in them read alike on any page.
_CORRECT = LinearSegmentedColormap.from_list("correct", ["#DCEAF5", "#56A5D8", "#0072B2", "#00436B"])
_MISTAKES = LinearSegmentedColormap.from_list("mistakes", ["#FBE9D9", "#F2B27A", "#D55E00", "#8A3A00"])
_MAX_NUMBERED = 16  # classes of a matrix whose cells hold their counts
_MAX_COUNT = 9_999  # that fits into a cell; larger ones are given in percent
_LABELLED_PAIRS = 5  # in the alternative text
_DARK = 0.45  # of the scale, from where on white is read better than black


def draw_confusion(
    counts: Sequence[Sequence[int]],
    classes: Sequence[str],
    most_confused: Sequence[Mapping[str, Any]],
    *,
    support: Sequence[int],
    num_classes: int,
    unit: str,
    subject: str,
) -> Picture:
    """Draw counts [true][predicted] of ``classes``, coloured by their fraction of the true class's ``support``.

    The classes may be a part of ``num_classes``. ``most_confused``: pairs with ``class``, ``predicted``, ``count`` and
    ``support``, for the alternative text. ``unit``: what is counted; ``subject``: which evaluation this is.
    """
    matrix = np.array(counts, dtype=np.int64).reshape(len(classes), len(classes))
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = np.where(matrix > 0, matrix / np.array(support)[:, None], np.nan)
    figure = new_figure(*_figure_size(classes))
    in_percent = bool((matrix > _MAX_COUNT).any())
    is_numbered = len(classes) <= _MAX_NUMBERED
    note = " (numbers: % of the true class)" if in_percent and is_numbered else ""
    axes = add_axes(figure, x=f"predicted{note}", y="true")
    _fill_cells(figure, axes, fractions)
    if is_numbered:
        _write_numbers(axes, 100 * fractions if in_percent else matrix, fractions)
    excerpt = (
        f": the {len(classes)} of {num_classes:,} classes that are confused most" if len(classes) < num_classes else ""
    )
    size = SMALL_SIZE if len(classes) > _MAX_NUMBERED else None
    names = range(len(classes))
    set_ticks(axes, "y", names, classes, size=size)
    set_ticks(axes, "x", names, classes, size=size, rotation=90 if max(map(len, classes)) > 3 else 0)
    hide_tick_marks(axes)
    return Picture(
        to_image(figure),
        "Confusion matrix",
        f"Confusion matrix{excerpt} of {subject}. Rows: true classes. Columns: predictions. {_describe_pairs(most_confused, unit)}",
    )


def _figure_size(classes: Sequence[str]) -> tuple[float, float]:
    """Return width and height in inches."""
    cell = 0.42 if len(classes) <= _MAX_NUMBERED else 0.2
    side = max(2.6, cell * len(classes))
    names = 0.085 * min(28, max(map(len, classes)))
    return side + names + 1.6, side + names + 0.6


def _fill_cells(figure: Figure, axes: Axes, fractions: np.ndarray) -> None:
    """Colour the cells that are not empty, and add the two scales."""
    is_correct = np.eye(len(fractions), dtype=bool)
    mistakes = np.where(is_correct, np.nan, fractions)
    largest = 0.0 if np.isnan(mistakes).all() else float(np.nanmax(mistakes))
    scales = (
        (np.where(is_correct, fractions, np.nan), _CORRECT, 1.0, "correct"),
        (mistakes, _MISTAKES, largest or 1.0, "mistaken"),
    )
    for values, colours, top, name in scales:
        mesh = axes.imshow(values, cmap=colours, vmin=0.0, vmax=top, interpolation="nearest", aspect="equal")
        if name == "correct" or largest:
            bar = figure.colorbar(mesh, ax=axes, shrink=0.6, aspect=25, pad=0.02)
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
            bar.ax.tick_params(colors=INK, labelsize=SMALL_SIZE, length=2)
            bar.ax.set_title(name, color=INK, fontsize=SMALL_SIZE, loc="left")
    for position in np.arange(len(fractions) + 1) - 0.5:
        for line in (axes.axhline, axes.axvline):
            line(position, color=INK, alpha=0.3, linewidth=0.4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_numbers(axes: Axes, numbers: np.ndarray, fractions: np.ndarray) -> None:
    """Write a number into every cell that is not empty, in black or white, whatever is read better."""
    off_diagonal = np.where(np.eye(len(fractions), dtype=bool), 0.0, np.nan_to_num(fractions))
    largest = float(off_diagonal.max()) or 1.0
    for row, column in np.argwhere(~np.isnan(fractions)).tolist():
        level = fractions[row, column] / (1.0 if row == column else largest)
        axes.text(
            column,
            row,
            "<1" if numbers[row, column] < 0.5 else f"{numbers[row, column]:,.0f}",
            ha="center",
            va="center",
            fontsize=SMALL_SIZE,
            color="white" if level > _DARK else "black",
        )


def _describe_pairs(pairs: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Return the sentence of the classes that are confused most."""
    if not pairs:
        return f"All {unit} are predicted correctly."
    described = (
        f"{pair['class']} taken for {pair['predicted']}, {pair['count']:,} of {pair['support']:,} {unit}"
        for pair in pairs[:_LABELLED_PAIRS]
    )
    return f"Most confused: {'; '.join(described)}."
