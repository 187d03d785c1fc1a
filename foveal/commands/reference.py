"""The reference of all settings, written from the models themselves: ``python -m foveal.commands.reference > docs/configuration.md``.

The one module of the shared package that looks into the stages, and only at their settings.
"""

import argparse
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from foveal.config import Config, get_section_class, get_setting_kind

_INTRODUCTION = """\
# Configuration

Written by `make docs` from the settings' own definitions; a test compares the two.

A stage reads one YAML file and overrides of the form `dotted.key=value`. Every setting is **science** (it can change a \
result; a run is only continued under the same science) or **machine** (it changes where, how fast and how visibly a \
result is obtained; it may be another one at every restart). A setting that is not listed here is refused."""

_HEADER = "| setting | type | default | range | half | what it is |\n|---|---|---|---|---|---|"
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
    """One line of the reference. ``default`` is PydanticUndefined where a value must be given."""

    name: str
    type_text: str
    default: Any
    allowed_range: str
    kind: str
    description: str


def iter_setting_docs(config_class: type[Config]) -> Iterator[SettingDoc]:
    """Every setting of a model, depth first, in the order of the code."""
    return _iter_setting_docs(config_class, "", PydanticUndefined, "science")


def _iter_setting_docs(model: type[Config], prefix: str, given: Any, half: str) -> Iterator[SettingDoc]:
    """``given`` is what the section around has for this section: its values take the place of the fields' defaults."""
    for name, field in model.model_fields.items():
        default = getattr(given, name) if isinstance(given, Config) else field.get_default(call_default_factory=True)
        mine = "machine" if half == "machine" else get_setting_kind(field)
        section = get_section_class(field)
        if section is None or default is None or isinstance(default, tuple):
            yield SettingDoc(
                f"{prefix}{name}", describe_type(field), default, describe_range(field), mine, field.description or ""
            )
        if section is not None:
            many = typing.get_origin(field.annotation) is tuple
            yield from _iter_setting_docs(section, f"{prefix}{name}.N." if many else f"{prefix}{name}.", default, mine)


def describe_type(field: FieldInfo) -> str:
    """The type as somebody says it who writes YAML."""
    return _describe_annotation(field.annotation)


def _describe_annotation(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return _WORDS.get(annotation, "section")
    if origin is Literal:
        return " or ".join(f"`{_format_value(argument)}`" for argument in arguments)
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
    """The limits that the field itself states, such as ``> 0, ≤ 1``."""
    return "; ".join(dict.fromkeys(_iter_ranges(field.annotation, field.metadata)))


def _iter_ranges(annotation: Any, limits: Sequence[Any]) -> Iterator[str]:
    """The limits of a value, then those of the values in it."""
    bounds = ((getattr(limit, name, None), sign) for limit in limits for name, sign in _SIGNS.items())
    if words := [sign.format(bound) for bound, sign in bounds if bound is not None]:
        yield ", ".join(words)
    inner = [part for part in typing.get_args(annotation) if typing.get_origin(part) is Annotated]
    for part in inner:
        value, field = typing.get_args(part)
        found = _iter_ranges(value, field.metadata if isinstance(field, FieldInfo) else ())
        yield from (words if words.startswith("each") else f"each {words}" for words in found)


def _format_value(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if value is None:
        return "null"
    plain = to_jsonable_python(value)
    return plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)


def render_reference(stage_configs: Mapping[str, type[Config]]) -> str:
    """The whole document, Markdown: a chapter of the sections that all stages share word for word, then each stage's own."""
    listed = {stage: _group_by_section(model) for stage, model in stage_configs.items()}
    first, *others = listed.values()
    shared = {name for name, lines in first.items() if all(other.get(name) == lines for other in others)}
    chapters = [
        _render_chapter(
            "All stages", "What is the same in every stage.", [first[name] for name in first if name in shared]
        )
    ]
    for stage, model in stage_configs.items():
        about = (model.__doc__ or "").strip().split("\n\n", 1)[0]
        own = [lines for name, lines in listed[stage].items() if name not in shared]
        chapters.append(_render_chapter(stage, about, own))
    return "\n\n".join([_INTRODUCTION, *chapters]) + "\n"


def _group_by_section(model: type[Config]) -> dict[str, list[SettingDoc]]:
    sections: dict[str, list[SettingDoc]] = {}
    for setting in iter_setting_docs(model):
        sections.setdefault(setting.name.partition(".")[0], []).append(setting)
    return sections


def _render_chapter(title: str, about: str, sections: Sequence[Sequence[SettingDoc]]) -> str:
    rows = [_render_row(setting) for section in sections for setting in section]
    return f"## {title}\n\n{about}\n\n{_HEADER}\n" + "\n".join(rows)


def _render_row(setting: SettingDoc) -> str:
    default = "required" if setting.default is PydanticUndefined else f"`{_format_value(setting.default)}`"
    cells = (f"`{setting.name}`", setting.type_text, default, setting.allowed_range, setting.kind, setting.description)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def get_stage_configs() -> dict[str, type[Config]]:
    """The stages and their settings, in the order of a pipeline."""
    from distill.config import DistillConfig
    from finetune.config import FinetuneConfig
    from pretrain.config import PretrainConfig

    return {"pretrain": PretrainConfig, "distill": DistillConfig, "finetune": FinetuneConfig}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the reference to stdout, or say whether a file still is the reference; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m foveal.commands.reference", description="The reference of all settings."
    )
    parser.add_argument("--check", metavar="FILE", type=Path, help="compare with this file, write nothing")
    options = parser.parse_args(argv)
    text = render_reference(get_stage_configs())
    if options.check is None:
        sys.stdout.write(text)
        return 0
    if options.check.is_file() and options.check.read_text() == text:
        return 0
    sys.stderr.write(f"foveal: {options.check} is not what the settings say; run make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
