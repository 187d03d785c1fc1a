"""Pages: templates, scripts and data in one HTML file that loads nothing, written atomically."""

import base64
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from foveal import __version__
from foveal.atomic import write_atomic
from foveal.errors import CheckpointError
from foveal.report.charts import Chart
from foveal.report.text import format_number

_ASSETS = Path(__file__).parent / "assets"


def render_page(template: str, title: str, charts: Mapping[str, Chart], facts: Mapping[str, Any]) -> str:
    """Return a page. charts: by the id of their element. facts: what the template shows; every text is escaped.

    The content security policy allows the page's own scripts, by their sha256, and nothing from elsewhere.
    """
    scripts = [read_plotly(), _read_asset("page.js")] if charts else [_read_asset("page.js")]
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            "style-src 'unsafe-inline'",
            "script-src " + " ".join(f"'sha256-{_hash(script)}'" for script in scripts),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    data = {key: {"data": chart.traces, "layout": chart.layout} for key, chart in charts.items()}
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            policy=policy,
            style=_read_asset("page.css"),
            scripts=scripts,
            chart_data=encode_for_script(data),
            written=time.strftime("%Y-%m-%d %H:%M"),
            version=__version__,
            **facts,
        )
    )


def encode_for_script(value: Any) -> str:
    """Return a value as JSON for a ``<script type="application/json">``: no character in it can end the script."""
    text = json.dumps(_without_nonfinite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def write_page(file: Path, page: str) -> None:
    """Write a page completely or not at all. Raises: CheckpointError if the folder cannot be written."""
    try:
        write_atomic(file, page.encode("utf-8", "replace"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written ({error.strerror or error}); name another place with --out FILE"
        ) from None


@cache
def read_plotly() -> str:
    """Return plotly.js, as the installed plotly brings it."""
    from plotly.offline import get_plotlyjs  # 4.8 MB, which a page without charts does without

    return get_plotlyjs()


@cache
def _read_asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")


@cache
def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    return environment


def _without_nonfinite(value: Any) -> Any:
    """Return plain data with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _without_nonfinite(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nonfinite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
