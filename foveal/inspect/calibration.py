"""A reliability diagram (Guo et al., "On Calibration of Modern Neural Networks", 2017): accuracy by confidence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foveal.inspect.chart import BLUE, INK, VERMILION, add_axes, add_legend, new_figure, to_image
from foveal.inspect.picture import Picture


def draw_calibration(
    bins: Sequence[Mapping[str, Any]], expected_error: float | None, *, subject: str
) -> Picture | None:
    """Draw ``accuracy`` against the mean ``confidence`` of bins of equal width, and the ``count`` of each below.

    A bin without images has null in place of numbers. None: no bin has images.
    """
    filled = [row for row in bins if row["count"]]
    if not filled or expected_error is None:
        return None
    figure = new_figure(4.6, 4.6)
    grid = figure.add_gridspec(2, 1, height_ratios=[3.2, 1.0])
    above = add_axes(figure, grid[0], y="accuracy", grid="both")
    below = add_axes(figure, grid[1], x="confidence: probability of the predicted class", y="images")
    confidences, accuracies = (np.array([row[name] for row in filled]) for name in ("confidence", "accuracy"))
    above.plot([0, 1], [0, 1], color=INK, linewidth=1.0, linestyle="--", label="as confident as right")
    above.vlines(confidences, confidences, accuracies, color=VERMILION, linewidth=2.0, alpha=0.7, label="gap")
    above.plot(confidences, accuracies, color=BLUE, marker="o", markersize=5, linewidth=1.5, label="measured")
    above.set_ylim(0, 1.02)
    width = 1 / len(bins)
    lefts = np.arange(len(bins)) * width
    below.bar(lefts, [row["count"] for row in bins], width=0.92 * width, align="edge", color=BLUE)
    for axes in (above, below):
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    above.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    add_legend(above, loc="upper left")
    tendency = _describe_tendency(filled)
    return Picture(
        to_image(figure),
        "Calibration",
        f"Accuracy against confidence, and the number of images by confidence, of {subject}. Expected calibration error "
        f"{100 * expected_error:.1f} %; {tendency}.",
    )


def _describe_tendency(filled: Sequence[Mapping[str, Any]]) -> str:
    total = sum(row["count"] for row in filled)
    gap = sum(row["count"] * (row["confidence"] - row["accuracy"]) for row in filled) / total
    if abs(gap) < 0.005:
        return "on average as confident as right"
    return f"on average {100 * abs(gap):.1f} points {'more' if gap > 0 else 'less'} confident than right"
