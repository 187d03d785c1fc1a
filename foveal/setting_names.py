"""Explanations of settings that do not validate: the nearest name of a setting, the nearest of its values."""

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_CLOSE = 0.65  # similarity, of 1, from which a name is suggested
_PREFIX = 0.95  # similarity of a name that begins with what was typed, such as lr of lr_per_256
_ELSEWHERE = 0.06  # what a name of another section has less
_EXACT_ELSEWHERE = 1.0 - _ELSEWHERE
_CLOSE_VALUE = 0.6
_MOST_SUGGESTIONS = 2


def get_section_class(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a section field (also of ``Section | None`` and of a list of sections), else None."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if (
            isinstance(candidate, type)
            and not isinstance(candidate, types.GenericAlias)
            and issubclass(candidate, BaseModel)
        ):
            return candidate
    return None


def is_setting(model: type[BaseModel], name: str) -> bool:
    """Return whether a dotted name is a setting, those in lists of sections aside."""
    return name in _iter_setting_names(model, "")


def explain_errors(model: type[BaseModel], error: ValidationError) -> str:
    """Return every error as `key: message`, joined; a typo gets the nearest setting's name."""
    return "; ".join(_explain_error(model, dict(problem)) for problem in error.errors())


def format_alternatives(names: Sequence[str]) -> str:
    """Return `Did you mean 'a' or 'b'?`."""
    return f"Did you mean {' or '.join(repr(name) for name in names)}?"


def _explain_error(model: type[BaseModel], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"] if "[" not in str(part)]  # pydantic also names a type of several
    name = ".".join(path) or "the file"
    if problem["type"] == "extra_forbidden":
        siblings = _setting_names_at(model, path[:-1])
        nearest = _nearest_names(model, path, siblings)
        return f"{name} is not a setting. " + (
            format_alternatives(nearest) if nearest else f"There are: {', '.join(siblings)}"
        )
    field = _field_at(model, path)
    if problem["type"] == "missing" or (problem["input"] is None and field is not None and field.is_required()):
        return _describe_missing(name, field)
    if problem["type"] == "model_type" and (inner := _setting_names_at(model, path)):
        example = "name" if "name" in inner else inner[0]
        return f"{name}: a section is expected, such as {name}.{example}=... (given: {problem['input']!r})"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":  # foveal's own checks state the values, except secrets
        return f"{name}: {message}" if path else message
    hint = _nearest_value(problem) if problem["type"] == "literal_error" else ""
    return f"{name}: {message} (given: {problem['input']!r}){hint}"


def _describe_missing(name: str, field: FieldInfo | None) -> str:
    description = field.description.rstrip(".") if field is not None and field.description else ""
    in_parentheses = f" ({description[0].lower()}{description[1:]})" if description else ""
    return f"{name} is missing and has no default{in_parentheses}"


def _nearest_value(problem: dict[str, Any]) -> str:
    """Return a suggestion of one of the values that a setting can have; nothing if none is near."""
    values = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    close = difflib.get_close_matches(str(problem["input"]).lower(), values, n=1, cutoff=_CLOSE_VALUE)
    return f". {format_alternatives(close)}" if close else ""


def _nearest_names(model: type[BaseModel], path: Sequence[str], siblings: Sequence[str]) -> list[str]:
    """Return the dotted names most like a name that is none, in its own section or in another one."""
    section, typed = path[:-1], path[-1].lstrip("-")
    scores = {".".join([*section, name]): _similarity(typed, name) for name in siblings}
    scores = {name: score for name, score in scores.items() if score >= _CLOSE}
    for name in _iter_setting_names(model, ""):
        score = _similarity(typed, name.rpartition(".")[2]) - _ELSEWHERE
        if not section:
            score = max(score, _ratio(typed, name.replace(".", "_")) - _ELSEWHERE)
        if score >= (_EXACT_ELSEWHERE if section else _CLOSE):
            scores.setdefault(name, score)
    best = max(scores.values(), default=0.0)
    return [name for name, score in scores.items() if score == best][:_MOST_SUGGESTIONS]


def _similarity(typed: str, name: str) -> float:
    begins = len(typed) > 1 and name.startswith(typed) and name != typed
    return _PREFIX if begins else _ratio(typed, name)


def _ratio(typed: str, name: str) -> float:
    return difflib.SequenceMatcher(None, typed, name).ratio()


def _iter_setting_names(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the dotted names of settings and sections, those in lists of sections aside."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = get_section_class(field)
        if section is not None and typing.get_origin(field.annotation) is not tuple:
            yield from _iter_setting_names(section, f"{prefix}{name}.")


def _setting_names_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    return list(_fields_at(model, path))


def _field_at(model: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    return _fields_at(model, path[:-1]).get(path[-1]) if path else None


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> dict[str, FieldInfo]:
    """Return the settings of the section at a path; none if there is no section."""
    for part in path:
        if part.isdigit():  # an index into a list of sections
            continue
        section = get_section_class(model.model_fields[part]) if part in model.model_fields else None
        if section is None:
            return {}
        model = section
    return model.model_fields
