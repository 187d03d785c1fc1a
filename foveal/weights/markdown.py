"""Markdown from values that nobody has checked: names of classes, paths, texts of settings. CommonMark and GitHub's tables."""

import re
from collections.abc import Iterable, Sequence

from foveal.redact import redact

# Line ends, other control characters, and marks that turn the direction of a text around.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
_SPECIAL = re.compile(r"[\\`*_{}\[\]|~$!]")
_BLOCK_START = re.compile(r"^(\d*)([.)](?= |$)|[#=+-])")  # of a heading, a rule, an item of a list
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def one_line(text: str) -> str:
    """Return a text in one line, without secrets and control characters."""
    return redact(" ".join(_CONTROL.sub(" ", text).split()))


def escape(text: str) -> str:
    """Return Markdown, in one line, that shows a text as it is: no markup, no HTML."""
    escaped = _SPECIAL.sub(lambda match: f"\\{match[0]}", one_line(text))
    return _BLOCK_START.sub(r"\1\\\2", escaped.translate(_ENTITIES))


def code(text: str) -> str:
    """Return a text, in one line, as a code span, outside of tables."""
    line = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if not line or line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_cell(text: str) -> str:
    """Return a code span for the cell of a table, where | needs a backslash even in code."""
    return code(text).replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))
