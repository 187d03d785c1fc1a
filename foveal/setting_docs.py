"""What the definitions of settings say of each: name, type, default, range, kind, description; read by the reference and --help."""

import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from foveal.config import Config, get_setting_kind
from foveal.setting_names import get_section_class

_WORDS = {types.NoneType: "null", Any: "anything", bool: "true or false", int: "integer", float: "number", str: "text"}
_SIGNS = {
    "gt": "> {:g}",
    "ge": "≥ {:g}",
    "lt": "< {:g}",
    "le": "≤ {:g}",
    "min_length": "at least {} long",
    "max_length": "at most {} long",
}


@dataclass(frozen=True)
class SettingDoc:
    """One line of the reference. ``default`` is PydanticUndefined if a value is required."""

    name: str
    type_text: str
    default: Any
    allowed_range: str
    kind: str
    description: str


def iter_setting_docs(config_class: type[Config]) -> Iterator[SettingDoc]:
    """Yield every setting of a config class, depth first, in the order of the code."""
    return _iter_setting_docs(config_class, "", PydanticUndefined, "science")


def _iter_setting_docs(
    config_class: type[BaseModel], prefix: str, section_default: Any, section_kind: str
) -> Iterator[SettingDoc]:
    """Yield the settings of a section; the values of ``section_default`` override the fields' own defaults."""
    for name, field in config_class.model_fields.items():
        if isinstance(section_default, Config):
            default = getattr(section_default, name)
        else:
            default = field.get_default(call_default_factory=True)
        kind = "machine" if section_kind == "machine" else get_setting_kind(field)
        section = get_section_class(field)
        if section is None or default is None or isinstance(default, tuple):
            yield SettingDoc(
                f"{prefix}{name}", describe_type(field), default, describe_range(field), kind, field.description or ""
            )
        if section is not None:
            is_list = typing.get_origin(field.annotation) is tuple
            yield from _iter_setting_docs(
                section, f"{prefix}{name}.N." if is_list else f"{prefix}{name}.", default, kind
            )


def describe_type(field: FieldInfo) -> str:
    """Return the type of a field in YAML's words."""
    return _describe_annotation(field.annotation)


def _describe_annotation(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return _WORDS.get(annotation, "section")
    if origin is Literal:
        return " or ".join(f"`{format_value(argument)}`" for argument in arguments)
    if origin is dict:
        return "mapping"
    if origin is Annotated:
        return _describe_annotation(arguments[0])
    inner = [_describe_annotation(argument) for argument in arguments if argument is not Ellipsis]
    if origin is tuple:
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    assert origin in {typing.Union, types.UnionType}, f"the reference has no words for {annotation}"
    return " or ".join(inner)


def describe_range(field: FieldInfo) -> str:
    """Return the limits that a field states, such as ``> 0, ≤ 1``."""
    return "; ".join(dict.fromkeys(_iter_ranges(field.annotation, field.metadata)))


def _iter_ranges(annotation: Any, limits: Sequence[Any]) -> Iterator[str]:
    """Yield the limits of a value, then those of the values in it."""
    bounds = ((getattr(limit, name, None), sign) for limit in limits for name, sign in _SIGNS.items())
    if texts := [sign.format(bound) for bound, sign in bounds if bound is not None]:
        yield ", ".join(texts)
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    each = "each " if any(tuple in (origin, typing.get_origin(part)) for part in parts) else ""
    for part in parts:
        if typing.get_origin(part) is Annotated:
            value, field = typing.get_args(part)
            ranges = _iter_ranges(value, field.metadata if isinstance(field, FieldInfo) else ())
            yield from (text if text.startswith("each") else f"{each}{text}" for text in ranges)


def format_value(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    if value is None:
        return "null"
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)
