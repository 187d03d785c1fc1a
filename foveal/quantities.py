"""Quantities as text: durations, and numbers with their nouns."""


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 42 s, 5 min 12 s, 3 h 20 min, 2 d 5 h."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def pluralize(number: float, noun: str) -> str:
    """Return a noun in the plural unless the number is 1."""
    return noun if number == 1 else f"{noun}{'es' if noun.endswith('tch') else 's'}"


def format_count(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1: 1 rank, 2 ranks, 2 microbatches, 0.5 epochs."""
    return f"{number if isinstance(number, int) else f'{number:g}'} {pluralize(number, noun)}"
