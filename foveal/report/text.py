"""Numbers and durations as a reader sees them."""

import math
from typing import Any

from foveal import quantities


def format_number(value: Any) -> str:
    """Return a number with four digits, thousands separated; anything else as text."""
    if type(value) not in (int, float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and 0 < abs(value) < 1e9):
        return f"{value:,.0f}"
    if not math.isfinite(value):
        return "not finite"
    magnitude = abs(value)
    if magnitude >= 1e9 or 0 < magnitude < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if magnitude >= 1e4 else f"{value:,.1f}" if magnitude >= 100 else f"{value:.4g}"


def format_duration(seconds: float | None) -> str:
    """Return a duration in its two largest units, below 10 s with a tenth; "" if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    return f"{seconds:.1f} s" if seconds < 10 else quantities.format_duration(seconds)


def format_count(number: int, noun: str) -> str:
    """Return a number, thousands separated, with its noun, in the plural unless it is 1."""
    return f"{number:,} {quantities.pluralize(number, noun)}"
