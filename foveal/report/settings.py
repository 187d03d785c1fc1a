"""The settings of a run: those that differ from the defaults of its stage, science first, and the complete list."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticUndefined, to_jsonable_python

from foveal.config import Config
from foveal.redact import redact
from foveal.setting_docs import SettingDoc, format_value, iter_setting_docs

# Where a run lives and where it is tracked: under "Files".
_PLACES = ("run.dir", "run.pipeline", "run.fresh", "tracking.uri", "tracking.experiment")
_MAX_VALUE_LENGTH = 300
_STAGES = ("pretrain", "distill", "finetune")


@dataclass(frozen=True)
class Setting:
    """A setting with its value and its default as text; default "": a value is required."""

    name: str
    value: str
    default: str
    kind: str
    description: str


@dataclass(frozen=True)
class Settings:
    """science, machine: those that differ from the defaults. complete: all, by name. has_defaults: whether they are known."""

    science: tuple[Setting, ...]
    machine: tuple[Setting, ...]
    complete: tuple[Setting, ...]
    has_defaults: bool


def read_settings(settings: Mapping[str, Any], stage: str) -> Settings:
    """Return the settings of a run by dotted name beside the defaults of its stage; "" for an unknown stage."""
    docs = _read_docs(stage)
    complete = tuple(_describe(name, value, docs) for name, value in settings.items())
    different = [
        setting
        for setting in complete
        if setting.name not in _PLACES and setting.value != setting.default and (docs or setting.value != "null")
    ]
    if not docs:
        different = []
    return Settings(
        tuple(setting for setting in different if setting.kind == "science"),
        tuple(setting for setting in different if setting.kind == "machine"),
        complete,
        bool(docs),
    )


def list_kinds(stage: str) -> dict[str, str]:
    """Return 'science' or 'machine' by the name of a setting of a stage; empty for an unknown stage."""
    return {name: doc.kind for name, doc in _read_docs(stage).items()}


def format_setting(value: Any) -> str:
    """Return a value as YAML writes it on one line, without secrets, cut where it is very long."""
    text = redact(format_value(_round(value)))
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]} ..."


def _round(value: Any) -> Any:
    """Return plain data with floats of at most six digits: 4/3 is 1.33333."""
    if isinstance(value, list | tuple):
        return [_round(inner) for inner in value]
    if isinstance(value, dict):
        return {name: _round(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _read_docs(stage: str) -> dict[str, SettingDoc]:
    """Return the definitions of a stage's settings by dotted name; a section's own are those of the section."""
    if stage not in _STAGES:
        return {}
    # By its name: what a report knows of a stage is its definitions of settings, which import neither torch nor timm.
    config_class: type[Config] = getattr(importlib.import_module(f"{stage}.config"), f"{stage.capitalize()}Config")
    return {doc.name: doc for doc in iter_setting_docs(config_class)}


def _describe(name: str, value: Any, docs: Mapping[str, SettingDoc]) -> Setting:
    doc = docs.get(name) or next(_iter_parents(name, docs), None)
    if doc is None:
        return Setting(name, format_setting(value), "", "science", "")
    is_own = doc.name == name
    default = "" if doc.default is PydanticUndefined or not is_own else format_setting(to_jsonable_python(doc.default))
    return Setting(name, format_setting(value), default, doc.kind, doc.description if is_own else "")


def _iter_parents(name: str, docs: Mapping[str, SettingDoc]) -> Iterator[SettingDoc]:
    """Yield the settings that a name lies in, such as that of a mapping: the name of an arm is none of ours."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in docs:
            yield docs[name]
