"""Charts by matplotlib's object API on an Agg canvas: no pyplot, no global state, readable on white and dark pages.

Paper is transparent and ink is a grey of contrast 4.5 : 1 on white and on black. Colours are those of Okabe and Ito
("Color Universal Design", 2008), which people with any kind of colour vision tell apart.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

INK = "#767676"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)  # of consecutive series
# From nothing, which is transparent, to blue: the page shows where a value is 0.
AMOUNTS = LinearSegmentedColormap.from_list("amounts", [(0.0, 0.447, 0.698, alpha) for alpha in (0.0, 1.0)])
FONT_SIZE, TITLE_SIZE, SMALL_SIZE = 9.0, 11.0, 7.5  # points
DPI = 150
_MAX_NAME = 28  # characters of a name on an axis
_FONT = "DejaVu Sans"  # part of matplotlib, so that every machine draws the same


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; constrained layout makes room for labels."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="none", edgecolor="none")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, *position: Any, title: str = "", x: str = "", y: str = "", grid: str = "") -> Axes:
    """Add axes in the house's style; ``position`` as of ``Figure.add_subplot``; ``grid``: lines of "x", "y" or "both"."""
    axes = figure.add_subplot(*(position or (1, 1, 1)))
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=FONT_SIZE, labelfontfamily=_FONT)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    if title:
        axes.set_title(plain_text(title), color=INK, fontsize=TITLE_SIZE, family=_FONT, loc="left")
    axes.set_xlabel(plain_text(x), color=INK, fontsize=FONT_SIZE, family=_FONT)
    axes.set_ylabel(plain_text(y), color=INK, fontsize=FONT_SIZE, family=_FONT)
    if grid:
        axes.grid(axis=grid, color=INK, alpha=0.25, linewidth=0.6)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
    return axes


def write_text(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write a text into axes, in data coordinates unless ``transform`` says otherwise."""
    axes.text(x, y, plain_text(text), **{"color": INK, "fontsize": SMALL_SIZE, "family": _FONT} | style)


def add_legend(axes: Axes, **style: Any) -> None:
    """Add a legend of the series with labels, without a frame."""
    font = font_manager.FontProperties(family=_FONT, size=FONT_SIZE)
    axes.legend(**{"frameon": False, "labelcolor": INK, "prop": font} | style)


def set_ticks(axes: Axes, axis: str, positions: Sequence[float], names: Sequence[str], **style: Any) -> None:
    """Set the ticks of axis "x" or "y" to names of users: shortened, without line breaks and mathematics."""
    setter = axes.set_xticks if axis == "x" else axes.set_yticks
    labels = [short_name(name) for name in names]
    setter(positions, labels=labels, minor=False, **{"family": _FONT} | style)


def hide_tick_marks(axes: Axes) -> None:
    """Leave the names at the ticks of both axes without marks."""
    axes.tick_params(length=0)


def font_file(*, bold: bool = False) -> str:
    """Return the file of the charts' font, for Pillow."""
    return font_manager.findfont(font_manager.FontProperties(family=_FONT, weight="bold" if bold else "normal"))


def plain_text(text: str) -> str:
    """Return a text as matplotlib draws it literally: no mathematics between dollars, one line per line."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in str(text).split("\n"))
    return "\n".join(lines).replace("$", "\\$")


def short_name(name: str, length: int = _MAX_NAME) -> str:
    """Return a name of one line, with its middle left out if it is longer than ``length`` characters."""
    words = " ".join(str(name).split())
    if len(words) > length:
        words = f"{words[: length // 2]}…{words[-(length - length // 2 - 1) :]}"
    return plain_text(words)


def to_image(figure: Figure) -> Image.Image:
    """Return a figure as a Pillow image, RGBA with transparent paper."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    with _ignore_missing_glyphs():
        canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba()), "RGBA")


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """Draw a box for a character that the font lacks, without a warning to the user."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied.*")
        yield
