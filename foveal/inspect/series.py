"""A picture of results by something: accuracy by layer, by learning rate, by fold; of several series side by side."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from foveal.inspect.chart import COLORS, add_axes, add_legend, new_figure, set_ticks, short_name, to_image
from foveal.inspect.picture import Picture

_MARKERS = "oDs^vP"
_MAX_WIDTH = 11.0  # inches
_SPREAD = 0.5  # of the distance of two positions, over which the series are laid out side by side

Values = Mapping[str, Sequence[float]]  # by the name of a position


def draw_series(
    series: Mapping[str, Values],
    positions: Sequence[str],
    *,
    title: str,
    x: str,
    y: str,
    subject: str,
    connected: bool = True,
) -> Picture:
    """Draw every value as a mark at its position, and a line through the means of a series.

    ``positions``: names in order; a series may lack some. With one position the series themselves are the positions.
    ``connected``: whether neighbours are joined; else the mean of a series over all positions is a line. Values in
    [0, 1] are drawn in percent. ``subject``: what was evaluated, for the alternative text.
    """
    described = _describe(series, positions, x, y, subject, connected)
    if len(positions) == 1 and len(series) > 1:
        merged = {name: values[positions[0]] for name, values in series.items() if values.get(positions[0])}
        series, positions, x, connected = {y: merged}, tuple(merged), "", False
    longest = max(len(short_name(name)) for name in positions)
    figure = new_figure(min(_MAX_WIDTH, max(4.5, 1.6 + len(positions) * max(0.5, 0.085 * longest))), 3.6)
    axes = add_axes(figure, x=x, y=y, grid="y")
    offsets = np.linspace(-0.5, 0.5, len(series)) * _SPREAD * (len(series) > 1) * (not connected)
    for number, (name, values) in enumerate(series.items()):
        colour, marker = COLORS[number % len(COLORS)], _MARKERS[number % len(_MARKERS)]
        _draw_one(axes, values, positions, float(offsets[number]), colour, marker, name, connected)
    is_crowded = len(positions) * longest * 0.085 > _MAX_WIDTH
    set_ticks(axes, "x", range(len(positions)), positions, rotation=90 if is_crowded else 0)
    axes.set_xlim(-0.6, len(positions) - 0.4)
    if _is_fraction(series):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if len(series) > 1:
        add_legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Picture(to_image(figure), title, described)


def _draw_one(
    axes: Axes,
    values: Values,
    positions: Sequence[str],
    offset: float,
    colour: str,
    marker: str,
    name: str,
    connected: bool,
) -> None:
    """Draw the values and the means of one series."""
    present = [(number + offset, values[position]) for number, position in enumerate(positions) if values.get(position)]
    xs = np.array([x for x, _ in present])
    means = [float(np.mean(measured)) for _, measured in present]
    is_single = all(len(measured) == 1 for _, measured in present)
    axes.scatter(
        [x for x, measured in present for _ in measured],
        [value for _, measured in present for value in measured],
        s=30,
        alpha=1 if is_single else 0.6,
        color=colour,
        marker=marker,
    )
    if connected:
        axes.plot(xs, means, markersize=4, linewidth=1.5, color=colour, marker=marker)
    elif is_single and means:
        axes.axhline(float(np.mean(means)), color=colour, linewidth=1.2, linestyle="--")
    else:
        axes.hlines(means, xs - 0.2, xs + 0.2, color=colour, linewidth=2.0)
    style = "-" if connected else "--" if is_single else ""
    axes.plot([], [], linestyle=style, label=short_name(name), color=colour, marker=marker)  # what the legend shows


def _is_fraction(series: Mapping[str, Values]) -> bool:
    return all(0 <= value <= 1 for values in series.values() for measured in values.values() for value in measured)


def _describe(
    series: Mapping[str, Values], positions: Sequence[str], x: str, y: str, subject: str, connected: bool
) -> str:
    """Return the alternative text: of every series the mean, or its best position where it has several."""

    def show(value: float) -> str:
        return f"{100 * value:.1f} %" if _is_fraction(series) else f"{value:.4g}"

    parts = []
    for name, values in series.items():
        means = {position: float(np.mean(values[position])) for position in positions if values.get(position)}
        if not means:
            continue
        if connected and len(means) > 1:
            first, last = (next(iter(order)) for order in (means, reversed(means)))
            low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
            parts.append(
                f"{name} from {show(means[first])} at {first} to {show(means[last])} at {last}, lowest {show(means[low])} "
                f"at {low}, highest {show(means[high])} at {high}"
            )
        else:
            every = [value for measured in values.values() for value in measured]
            spread = f" ({show(min(every))} to {show(max(every))})" if len(every) > 1 else ""
            parts.append(f"{name} {show(float(np.mean(every)))}{spread}")
    by = f" by {x}" if x and len(positions) > 1 else ""
    return f"{y}{by}, of {subject}: {'; '.join(parts)}."
