"""The end of a stage's --help: its main settings, the configs that ship with it, and examples; without torch."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from foveal.setting_docs import SettingDoc, format_value, iter_setting_docs
from foveal.training.config_files import SHIPPED_CONFIGS, read_summary
from foveal.training.stage import Stage

_NARROWEST, _WIDEST = 80, 120  # columns


def format_stage_help(stage: Stage[Any, Any]) -> str:
    """Return the main settings with default and description, the shipped configs, and examples."""
    docs = {doc.name: doc for doc in iter_setting_docs(stage.config_class)}
    settings = [(_format_default(docs[name]), _shorten(docs[name])) for name in stage.config_class.main_settings]
    files = sorted((SHIPPED_CONFIGS / stage.name).glob("*.yaml"))
    configs = [(file.stem, read_summary(file)) for file in files]
    return "\n".join(
        [
            "",
            "main settings with their defaults (all settings: docs/configuration.md):",
            *format_rows(settings),
            "",
            f"configs that ship (foveal config show {stage.name}/NAME prints one):",
            *format_rows(configs, most_lines=1),
            "",
            "examples:",
            *(f"  {example}" for example in stage.examples),
            "",
        ]
    )


def format_rows(rows: Sequence[tuple[str, str]], most_lines: int | None = None) -> Iterator[str]:
    """Yield lines of two columns, as wide as the terminal; the second is wrapped, or shortened to ``most_lines``."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, _NARROWEST), _WIDEST)
    indent = max((len(name) for name, _ in rows), default=0) + 4
    for name, text in rows:
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            max_lines=most_lines,
            placeholder=" ...",
        )


def _format_default(doc: SettingDoc) -> str:
    """Return a setting as an override of its default is written."""
    if doc.default is PydanticUndefined:
        return f"{doc.name}=... (required)"
    return f"{doc.name}={format_value(doc.default)}"


def _shorten(doc: SettingDoc) -> str:
    """Return the description up to its first semicolon or full stop, with what it says of the default, and the values."""
    first, *others = re.split(r"[;.] |\.$", doc.description)
    default = "" if doc.default is PydanticUndefined else f"{format_value(doc.default)}: "
    text = "; ".join([first, *(part for part in others if default and part.startswith(default))])
    values = re.findall(r"`([^`]+)`", doc.type_text)
    return text if all(value in text for value in values) else f"{text} ({', '.join(values)})"
