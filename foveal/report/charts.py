"""Charts: traces and layout as Plotly reads them, with a text alternative: a sentence and a table.

Names of metrics, classes and runs are texts of users. Plotly reads a small HTML in texts; ``escape_text`` makes them
plain. Colours of axes and texts are not stated here: the page's style sheet has them, for light, dark and print.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.report.events import Event, EventKind, Events
from foveal.report.series import Series
from foveal.report.text import format_count, format_number
from foveal.runs.results import is_lower_better

# Each with a contrast of at least 3:1 on the light and on the dark page.
PALETTE = ("#2f7fd1", "#c8641b", "#2b9168", "#a05cc4", "#c4487c", "#8a7a1f", "#1d8c9c", "#7d7d86")
MAX_TRACES = 8
_TABLE_ROWS = 12
_MAX_MARKERS = 80  # points of a curve with a mark each
_LEGEND_WIDTH, _CHARACTER_WIDTH, _LEGEND_ROW = 420, 6.5, 20  # pixels: of a chart in two columns, of a letter, of a row
_LANES: tuple[tuple[EventKind, str, str, str], ...] = (  # kind, symbol, colour, name in the legend
    ("bad images", "diamond", PALETTE[5], "image that did not decode"),
    ("refused", "x", PALETTE[4], "update refused"),
    ("roll-back", "triangle-left", PALETTE[3], "roll-back"),
    ("attempt", "triangle-right", PALETTE[0], "attempt begins"),
)


@dataclass(frozen=True)
class Chart:
    """A chart of a page. ``key``: unique in its run. sentence, columns, rows: the text alternative."""

    key: str
    title: str
    sentence: str
    traces: tuple[dict[str, Any], ...]
    layout: dict[str, Any]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    has_log_scale: bool = False  # whether a button switches the scale
    height: int = 300

    @property
    def is_log(self) -> bool:
        """Whether the scale is logarithmic until the button is pressed."""
        return self.layout.get("yaxis", {}).get("type") == "log"


@dataclass(frozen=True)
class Curve:
    """A series with its name in a legend. is_evaluation: drawn with a mark at each value, and one at the best.

    metric: the logged name that says what is better; "": the name. color: "" for the next of the palette.
    """

    name: str
    series: Series
    is_evaluation: bool = False
    metric: str = ""
    color: str = ""

    @property
    def is_higher_better(self) -> bool:
        """The direction of the metric."""
        return not is_lower_better(self.metric or self.name)


@dataclass
class Axes:
    """Titles and scales of the axes. has_log_scale: whether y can be logarithmic. has_decades_only: whether only powers
    of ten are labelled then. tickformat: of y, in d3's words.
    """

    y: str
    x: str = "step"
    is_log: bool = False
    has_log_scale: bool = False
    has_decades_only: bool = False
    tickformat: str = ""
    from_zero: bool = False


def escape_text(text: str) -> str:
    """Return a text of a user as Plotly shows it literally."""
    flat = " ".join(text.split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        flat = flat.replace(character, entity)
    return flat


def draw_curves(
    key: str, title: str, curves: Sequence[Curve], axes: Axes, events: Events | None = None, *, has_lane: bool = False
) -> Chart | None:
    """Return a chart of curves over steps; None if no value is finite.

    events: attempts and roll-backs become vertical lines; ``has_lane`` adds a strip with all of them below the curves.
    """
    drawn = [curve for curve in curves if curve.series.last is not None][:MAX_TRACES]
    if not drawn:
        return None
    traces = [
        trace
        for number, curve in enumerate(drawn)
        for trace in _curve_traces(curve, curve.color or PALETTE[number], axes.x)
    ]
    legend_rows = _count_legend_rows([curve.name for curve in drawn])
    layout = _layout(axes, legend_rows)
    height = 280 + _LEGEND_ROW * max(1, legend_rows)
    if events is not None:
        layout["shapes"] = _event_lines(events)
        if has_lane and (lane := _lane_traces(events)):
            traces += lane
            rows = len({trace["y"][0] for trace in lane if trace["y"]})
            height += 26 * rows + 30
            share = (26 * rows + 14) / (height - 90)
            layout["yaxis"]["domain"] = [share + 0.06, 1]
            layout["xaxis"]["anchor"] = "y3"
            layout["yaxis3"] = {
                "domain": [0, share],
                "range": [-0.6, rows - 0.4],
                "fixedrange": True,
                "showticklabels": False,
                "zeroline": False,
            }
    columns, rows = tabulate_curves(drawn, axes.x)
    return Chart(
        key,
        title,
        " ".join(describe_curve(curve, axes.x) for curve in drawn),
        tuple(traces),
        layout,
        columns,
        rows,
        has_log_scale=axes.has_log_scale and all(_is_positive(curve.series) for curve in drawn),
        height=height,
    )


def describe_curve(curve: Curve, axis: str) -> str:
    """Return a sentence with the first, the last and the best value of a curve; ``axis``: what its steps count."""
    name, series, at = curve.name, curve.series, axis if axis == "step" else f"{axis}:"
    if series.first is None or series.last is None or series.lowest is None or series.highest is None:
        return f"{name}: no finite value."
    best = series.highest if curve.is_higher_better else series.lowest
    word = "highest" if curve.is_higher_better else "lowest"
    gaps = f", {format_count(series.num_nonfinite, 'value')} not finite" if series.num_nonfinite else ""
    if series.num_values == 1:
        return f"{name}: {format_number(series.last[1])} at {at} {series.last[0]:,}."
    return (
        f"{name}: {format_number(series.first[1])} at {at} {series.first[0]:,}, {format_number(series.last[1])} at {at} "
        f"{series.last[0]:,}, {word} {format_number(best[1])} at {at} {best[0]:,}{gaps}."
    )


def tabulate_curves(curves: Sequence[Curve], axis: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the columns and some rows of curves: steps of the first curve, and those of the first evaluations.

    An evaluation has a value at its own steps only; a curve of a long run the mean that is nearest.
    """
    columns = (axis, *(curve.name for curve in curves))
    steps = {step for step, _ in curves[0].series.table(_TABLE_ROWS)}
    evaluated = next((curve for curve in curves if curve.is_evaluation), None)
    steps |= {step for step, _ in evaluated.series.table(_TABLE_ROWS)} if evaluated is not None else set()
    cells = [_cells_at(curve, sorted(steps)) for curve in curves]
    return columns, tuple(
        (f"{step:,}", *row) for step, row in zip(sorted(steps), zip(*cells, strict=True), strict=True)
    )


def draw_dots(key: str, title: str, groups: Mapping[str, Sequence[tuple[str, float]]], y_title: str) -> Chart | None:
    """Return a chart with a column of dots for each group of (name, value)."""
    named = {group: values for group, values in groups.items() if values}
    if not named:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": escape_text(group),
            "x": [escape_text(group)] * len(values),
            "y": [value for _, value in values],
            "text": [escape_text(name) for name, _ in values],
            "hovertemplate": "%{text}: %{y}<extra></extra>",
            "marker": {"size": 10, "opacity": 0.8, "color": PALETTE[number % len(PALETTE)]},
        }
        for number, (group, values) in enumerate(named.items())
    ]
    layout = _layout(Axes(y_title, x=""), legend_rows=0)
    layout["xaxis"] |= {"type": "category"}
    sentence = " ".join(
        f"{group}: {format_count(len(values), 'run')}, {format_number(min(value for _, value in values))} to "
        f"{format_number(max(value for _, value in values))}."
        for group, values in named.items()
    )
    return Chart(key, title, sentence, tuple(traces), layout)


def thin_trace(series: Series) -> tuple[list[int], list[float | None]]:
    """Return steps and values of a curve as a trace has them: at most 2,000."""
    points = series.points()
    return [step for step, _ in points], [value for _, value in points]


def _curve_traces(curve: Curve, color: str, unit: str) -> list[dict[str, Any]]:
    steps, values = thin_trace(curve.series)
    name, series = escape_text(curve.name), curve.series
    # A line has no point where its neighbours are gaps.
    is_sparse = curve.is_evaluation or series.num_values <= 30 or series.num_nonfinite > 0
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if is_sparse and series.num_values <= _MAX_MARKERS else "lines",
        "name": name,
        "x": steps,
        "y": values,
        "line": {"color": color, "width": 2 if curve.is_evaluation else 1.5},
        "marker": {"color": color, "size": 6 if curve.is_evaluation else 4},
        "hovertemplate": f"{unit} %{{x:,}}: %{{y:.5~g}}<extra>{name}</extra>",
    }
    traces = [line]
    if series.is_thinned:
        line |= {"opacity": 0.35, "mode": "lines", "showlegend": False, "hoverinfo": "skip", "legendgroup": name}
        del line["hovertemplate"]
        means = series.means()
        traces.append(
            line
            | {"opacity": 1, "showlegend": True, "line": {"color": color, "width": 2}}
            | {"x": [step for step, _ in means], "y": [value for _, value in means]}
            | {"hoverinfo": "all", "hovertemplate": f"{unit} %{{x:,}}, mean: %{{y:.5~g}}<extra>{name}</extra>"}
        )
    best = series.highest if curve.is_higher_better else series.lowest
    if curve.is_evaluation and best is not None and series.num_values > 1:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"best {name}",
                "x": [best[0]],
                "y": [best[1]],
                "showlegend": False,
                "marker": {"color": color, "size": 13, "symbol": "star"},
                "hovertemplate": f"best, {unit} %{{x:,}}: %{{y:.5~g}}<extra>{name}</extra>",
            }
        )
    return traces


def _lane_traces(events: Events) -> list[dict[str, Any]]:
    """Return the marks of a run, a row for each kind; none for a run of one attempt without incidents."""
    kinds = [lane for lane in _LANES if events.marks.get(lane[0])]
    if len(kinds) == 1 and kinds[0][0] == "attempt" and len(events.marks["attempt"]) == 1:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [event.step for event in events.marks[kind]],
            "y": [row] * len(events.marks[kind]),
            "yaxis": "y3",
            "text": [escape_text(event.text) for event in events.marks[kind]],
            "hovertemplate": "step %{x:,}: %{text}<extra></extra>",
            "marker": {"symbol": symbol, "size": 9, "color": color},
        }
        for row, (kind, symbol, color, name) in enumerate(kinds)
    ]


def _event_lines(events: Events) -> list[dict[str, Any]]:
    """Return vertical lines where an attempt after the first begins and where the run rolled back."""
    marked: list[tuple[Event, str]] = [(event, PALETTE[0]) for event in events.marks.get("attempt", ())[1:]]
    marked += [(event, PALETTE[3]) for event in events.marks.get("roll-back", ())]
    return [
        {
            "type": "line",
            "x0": event.step,
            "x1": event.step,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": color, "width": 1, "dash": "dot"},
        }
        for event, color in marked[:100]
    ]


def _layout(axes: Axes, legend_rows: int) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "margin": {"l": 64, "r": 16, "t": 12 + 22 * legend_rows, "b": 44},
        "xaxis": {"title": {"text": axes.x}, "zeroline": False, "hoverformat": ",d"},
        "yaxis": {
            "title": {"text": escape_text(axes.y)},
            "zeroline": False,
            "automargin": True,
            "minorloglabels": "complete",  # on a logarithmic axis 0.5, and not its digit
        },
        "showlegend": legend_rows > 0,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x" if legend_rows else "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": "zoom",
    }
    if axes.is_log:
        layout["yaxis"] |= {"type": "log", "exponentformat": "none", "dtick": 1 if axes.has_decades_only else "D2"}
    if axes.tickformat:
        layout["yaxis"]["tickformat"] = axes.tickformat
    if axes.from_zero:
        layout["yaxis"]["rangemode"] = "tozero"
    return layout


def _count_legend_rows(names: Sequence[str]) -> int:
    """Return the rows of a legend whose entries are as wide as the widest; 0 for one name, which the title has."""
    widest = max(map(len, names)) * _CHARACTER_WIDTH + 60
    return math.ceil(len(names) / max(1, int(_LEGEND_WIDTH / widest))) if len(names) > 1 else 0


def _is_positive(series: Series) -> bool:
    return series.lowest is not None and series.lowest[1] > 0


def _cells_at(curve: Curve, steps: Sequence[int]) -> list[str]:
    """Return the values of a curve at ascending steps as text; "" where an evaluation has none."""
    series = curve.series
    points = [point for point in (series.means() if series.is_thinned else series.points()) if point[1] is not None]
    cells, at = [], 0
    for step in steps:
        while at + 1 < len(points) and abs(points[at + 1][0] - step) <= abs(points[at][0] - step):
            at += 1
        is_known = bool(points) and (points[at][0] == step or series.is_thinned or not curve.is_evaluation)
        cells.append(format_number(points[at][1]) if is_known else "")
    return cells
