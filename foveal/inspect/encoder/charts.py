"""Charts of attention and activations by layer, on transparent paper: they read on light and on dark pages."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from PIL import Image

from foveal.inspect.encoder.activations import ActivationMeter, bin_values

_INK = "#767676"  # the same contrast, 4.5 : 1, to white and to black
_BLUE, _ORANGE = "#3a87c8", "#d9661f"  # told apart with every kind of colour blindness
_WIDTH, _DPI = 8.0, 200  # inches; pixels per inch: sharp at 800 pixels on a screen of twice that density
_FONT, _SMALL = 11, 10  # points
_NUM_BINS = 120  # of the histogram's values
_FEWEST_TICKS = 12  # layers that have a label each
_MIN_SPAN = 30.0  # largest over smallest value from which an axis is logarithmic


def draw_attention_chart(
    distances: np.ndarray, entropies: np.ndarray, uniform_distance: float, uniform_entropy: float
) -> Image.Image:
    """Draw mean distance in pixels and entropy in nats, each [blocks, heads], of every head over the blocks."""
    figure = Figure((_WIDTH, 3.9), dpi=_DPI)
    panels = [
        (distances, uniform_distance, "mean attention distance in pixels"),
        (entropies, uniform_entropy, "entropy of attention in nats"),
    ]
    for number, (values, uniform, label) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, number)
        blocks = np.arange(1, len(values) + 1)
        axes.axhline(uniform, color=_INK, linewidth=1.2, linestyle="--", label="uniform attention")
        heads = np.broadcast_to(blocks[:, None], values.shape)
        axes.plot(heads.ravel(), values.ravel(), "o", color=_BLUE, markersize=4.5, alpha=0.7, mew=0, label="a head")
        axes.plot(blocks, values.mean(1), color=_ORANGE, linewidth=2, label="mean of the heads")
        axes.set_ylim(0, 1.08 * max(uniform, float(values.max())))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block", color=_INK, fontsize=_FONT)
        axes.set_title(label, color=_INK, fontsize=_FONT, loc="left")
        _style(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, labelcolor=_INK, fontsize=_SMALL)
    figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=2.5)
    return _to_image(figure)


def draw_activation_chart(meters: Sequence[ActivationMeter]) -> Image.Image:
    """Draw the distribution of every layer's output, its root mean square, and its variation between images."""
    variations = [meter.variation for meter in meters]
    has_variation = all(variation is not None for variation in variations)
    figure = Figure((_WIDTH, 7.2 if has_variation else 5.8), dpi=_DPI)
    heights = [3.2, 1.4, 1.4] if has_variation else [3.2, 1.4]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[40, 1], hspace=0.32, wspace=0.04)
    positions = np.arange(1, len(meters) + 1)
    histogram = figure.add_subplot(grid[0, 0])
    _draw_histograms(figure, histogram, figure.add_subplot(grid[0, 1]), meters)
    rms = figure.add_subplot(grid[1, 0], sharex=histogram)
    values = np.array([meter.rms for meter in meters])
    rms.plot(positions, values, "o-", color=_BLUE, linewidth=2, markersize=5)
    if values.min() > 0 and values.max() / values.min() > _MIN_SPAN:
        rms.set_yscale("log")
    else:
        rms.set_ylim(0, 1.12 * float(values.max()) or 1)
        rms.yaxis.set_major_locator(MaxNLocator(4))
    rms.set_title("root mean square: which layers activate most", color=_INK, fontsize=_FONT, loc="left")
    panels = [histogram, rms]
    if has_variation:
        variation = figure.add_subplot(grid[2, 0], sharex=histogram)
        shares = 100 * np.array(variations, dtype=float)
        variation.plot(positions, shares, "o-", color=_BLUE, linewidth=2, markersize=5)
        variation.set_ylim(0, max(105.0, 1.05 * float(shares.max())))
        title = "deviation between images, in % of root mean square: which layers change most"
        variation.set_title(title, color=_INK, fontsize=_FONT, loc="left")
        panels.append(variation)
    for axes in panels:
        _style(axes)
        axes.tick_params(labelbottom=axes is panels[-1])
    _label_layers(panels[-1], [meter.name for meter in meters])
    return _to_image(figure)


def _draw_histograms(figure: Figure, axes: Axes, key: Axes, meters: Sequence[ActivationMeter]) -> None:
    """Draw one column per layer: shares of its values as shades of blue, on a logarithmic scale, and quantiles."""
    typical = float(np.median([meter.rms for meter in meters])) or 1.0
    top = max(1e-6, *(meter.largest() for meter in meters))
    edges = typical * np.sinh(np.linspace(-np.arcsinh(top / typical), np.arcsinh(top / typical), _NUM_BINS + 1))
    shares = np.stack([np.histogram(bin_values(), edges, weights=meter.counts)[0] for meter in meters], axis=1)
    shares = shares / shares.sum(0)
    lowest = max(1e-7, float(shares[shares > 0].min()))
    shades = np.array([(*to_rgb(_BLUE), alpha) for alpha in np.linspace(0.1, 1, 256)])
    columns = np.arange(len(meters) + 1) + 0.5
    mesh = axes.pcolormesh(
        columns, edges, np.ma.masked_equal(shares, 0), cmap=ListedColormap(shades), norm=LogNorm(lowest, shares.max())
    )
    for fraction, style in ((0.01, ":"), (0.5, "-"), (0.99, ":")):
        levels = [meter.quantile(fraction) for meter in meters]
        axes.stairs(levels, columns, color=_ORANGE, linewidth=1.8, linestyle=style, baseline=None)
    axes.set_yscale("asinh", linear_width=typical)
    axes.yaxis.set_major_locator(FixedLocator(_choose_ticks(typical, top)))
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.minorticks_off()
    title = "values of the outputs; orange: median, 1 % and 99 %"
    axes.set_title(title, color=_INK, fontsize=_FONT, loc="left")
    bar = figure.colorbar(mesh, cax=key)
    bar.set_label("share of values", color=_INK, fontsize=_SMALL)
    bar.ax.tick_params(colors=_INK, labelsize=_SMALL, which="both")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _choose_ticks(linear_width: float, top: float) -> list[float]:
    """Return round values of both signs and 0: powers of ten beyond the linear part of an axis, or a few within it."""
    powers = [10.0**power for power in range(-7, 8) if linear_width <= 10.0**power <= top]
    if len(powers) < 2:
        powers = [factor * 10.0**power for power in range(-7, 8) for factor in (1, 2, 5)]
        powers = [value for value in powers if 0.4 * min(linear_width, top) <= value <= top][-4:]
    return [*(-power for power in reversed(powers)), 0.0, *powers]


def _label_layers(axes: Axes, names: Sequence[str]) -> None:
    """Label the layers: all of a few, of blocks by their numbers, of many every n-th."""
    step = -(-len(names) // (2 * _FEWEST_TICKS))
    are_blocks = all(name.startswith("block ") for name in names)
    labels = [name.removeprefix("block ") if are_blocks else name for name in names]
    axes.xaxis.set_major_locator(FixedLocator(list(range(1, len(names) + 1, step))))
    axes.set_xticklabels(labels[::step], rotation=0 if are_blocks or len(names) <= 6 else 30)
    axes.set_xlabel("block" if are_blocks else "layer", color=_INK, fontsize=_FONT)
    axes.set_xlim(0.5, len(names) + 0.5)


def _style(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)


def _to_image(figure: Figure) -> Image.Image:
    """Return the figure as an RGBA image. No state of matplotlib's is touched: a notebook may use it at the same time."""
    figure.patch.set_alpha(0)
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, bbox_inches="tight", pad_inches=0.08)
    return Image.open(stream).copy()
