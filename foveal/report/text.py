"""Numbers and durations as a reader sees them."""

import math
from typing import Any


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
    """Return a duration in its two largest units: 42 s, 5 min 12 s, 3 h 20 min, 2 d 5 h; "" if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    total = round(seconds)
    if total < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('tch') else 's'}"
