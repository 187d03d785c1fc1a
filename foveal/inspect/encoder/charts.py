"""Charts of attention and activations by layer, on transparent paper: they read on light and on dark pages."""

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
        axes.set_ylim(0, 1.08 * max(uniform, float(values.max())) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block", color=_INK, fontsize=_FONT)
        axes.set_title(label, color=_INK, fontsize=_FONT, loc="left")
        _style(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, labelcolor=_INK, fontsize=_SMALL)
    figure.tight_layout(pad=0.4, rect=(0, 0.07, 1, 1), w_pad=2.5)
    return _to_image(figure)


def draw_activation_chart(meters: Sequence[ActivationMeter]) -> Image.Image:
    """Draw the distribution of every layer's output, its root mean square, and its variation between images."""
    variations = [meter.variation for meter in meters]
    has_variation = all(variation is not None for variation in variations)
    figure = Figure((_WIDTH, 7.2 if has_variation else 5.8), dpi=_DPI)
    has_long_names = not _are_blocks(meters)
    heights = [3.2, 1.4, 1.4] if has_variation else [3.2, 1.4]
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=[40, 1], hspace=0.32, wspace=0.04)
    grid.update(left=0.075, right=0.9, top=0.96, bottom=0.16 if has_long_names else 0.08)
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
    _label_layers(panels[-1], meters)
    return _to_image(figure)


def _draw_histograms(figure: Figure, axes: Axes, key: Axes, meters: Sequence[ActivationMeter]) -> None:
    """Draw one column per layer: shares of its values as shades of blue, on a logarithmic scale, and quantiles."""
    typical = float(np.median([meter.rms for meter in meters])) or 1.0
    extents = [meter.extent() for meter in meters]
    low, high = min(low for low, _ in extents), max(high for _, high in extents)
    margin = 1e-2 * max(high - low, 1e-6)  # the extents are the middles of bins, 1 % wide
    edges = typical * np.sinh(
        np.linspace(np.arcsinh((low - margin) / typical), np.arcsinh((high + margin) / typical), _NUM_BINS + 1)
    )
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
    axes.yaxis.set_major_locator(FixedLocator(_choose_ticks(typical, max(-low, high))))
    axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.minorticks_off()
    axes.set_ylim(edges[0], edges[-1])
    title = "values of the outputs; orange: median, 1 % and 99 %"
    axes.set_title(title, color=_INK, fontsize=_FONT, loc="left")
    bar = figure.colorbar(mesh, cax=key)
    bar.set_label("share of values", color=_INK, fontsize=_SMALL)
    bar.ax.tick_params(colors=_INK, labelsize=_SMALL, which="both")
    bar.ax.patch.set_alpha(0)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _choose_ticks(linear_width: float, top: float) -> list[float]:
    """Return round values of both signs and 0: powers of ten beyond the linear part of an axis, or a few within it."""
    powers = [10.0**power for power in range(-7, 8) if linear_width <= 10.0**power <= top]
    if len(powers) < 2:
        powers = [factor * 10.0**power for power in range(-7, 8) for factor in (1, 2, 5)]
        powers = [value for value in powers if 0.4 * min(linear_width, top) <= value <= top][-4:]
    return [*(-power for power in reversed(powers)), 0.0, *powers]


def _are_blocks(meters: Sequence[ActivationMeter]) -> bool:
    return all(meter.name.startswith("block ") for meter in meters)


def _label_layers(axes: Axes, meters: Sequence[ActivationMeter]) -> None:
    """Label the layers: all of a few, of blocks by their numbers, of many every n-th."""
    step = -(-len(meters) // (2 * _FEWEST_TICKS))
    labels = [meter.name.removeprefix("block ") for meter in meters]
    axes.xaxis.set_major_locator(FixedLocator(list(range(1, len(meters) + 1, step))))
    axes.set_xticklabels(labels[::step], rotation=0 if _are_blocks(meters) else 20)
    axes.set_xlabel("block" if _are_blocks(meters) else "layer", color=_INK, fontsize=_FONT)
    axes.set_xlim(0.5, len(meters) + 0.5)


def _style(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)


def _to_image(figure: Figure) -> Image.Image:
    """Return the figure as an RGBA image. No state of matplotlib's is touched: a notebook may use it at the same time."""
    figure.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba()))
