"""Settings: a typed, frozen, strict model per stage; YAML for values, ``dotted.key=value`` for overrides.

A setting is science (it can change a result) or, declared by ``machine(...)``, machine (it changes rounding at most).
A resume compares only science; see ``Config.science_settings``.
"""

import logging
import re
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from foveal.errors import ConfigError
from foveal.redact import describe_secrets_in_settings
from foveal.renames import describe_renames, translate_override, translate_settings
from foveal.setting_names import explain_errors, get_section_class
from foveal.strict_yaml import dump_yaml, parse_yaml, read_yaml

_log = logging.getLogger(__name__)


def science(
    default: Any = PydanticUndefined,
    description: str = "",
    *,
    since: str | None = None,
    neutral: Any = None,
    **constraints: Any,
) -> Any:
    """Declare a setting whose value can change a result.

    ``since``: for a setting that is added, the version that adds it. Runs of earlier versions have no such setting and
    continue at ``neutral``, the value, as JSON, that does what those versions did. The default may be another value: a
    run that was made without the setting keeps ``neutral`` unless the setting is stated (``keep_neutral_values``).
    """
    extra: dict[str, Any] = {"half": "science"} | ({} if since is None else {"since": since, "neutral": neutral})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def machine(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """Declare a setting that changes where, how fast or how visibly a result is obtained, not the result."""
    return Field(default, description=description, json_schema_extra={"half": "machine"}, **constraints)


def _normalize_image_size(value: Any) -> Any:
    """Return an int for a square, so that equal sizes are equal values. Raises: ValueError for any invalid size."""
    sides = value if isinstance(value, tuple) else (value,)
    if len(sides) > 2 or not sides or any(type(side) is not int or side < 1 for side in sides):
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"a number of pixels or [height, width] is expected, each at least 1 (given: {shown!r})")
    return sides[0] if sides[0] == sides[-1] else sides


_Pixels = Annotated[int, Field(ge=1)]
ImageSize = Annotated[_Pixels | tuple[_Pixels, _Pixels], BeforeValidator(_normalize_image_size)]


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of an ``ImageSize``, in pixels."""
    return size if isinstance(size, tuple) else (size, size)


class Config(BaseModel):
    """Base class of every section: frozen, without unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Settings that are stated one instead of the other: an override of one replaces the others of the file.
    alternatives: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load(cls, file: Path, overrides: Sequence[str] = (), on_warning: Callable[[str], None] = _log.warning) -> Self:
        """Read a YAML file, apply ``dotted.key=value`` overrides, validate. ``on_warning`` gets one text about old names.

        Raises: ConfigError that names the file and the key and, for a typo, the nearest setting; also for a literal
        secret, because the run directory stores the settings.
        """
        tree = read_yaml(file)
        if tree is None:
            raise ConfigError(f"{file}: a mapping of settings is expected, and this file has none")
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: a mapping of settings is expected, this is {type(tree).__name__}")
        tree, renamed = translate_settings(tree, cls.model_fields)
        renamed |= _apply_overrides(tree, overrides, cls.model_fields, cls.alternatives)
        if renamed:
            on_warning(describe_renames(str(file), renamed))
        cfg = cls.from_dict(tree, str(file))
        _refuse_secrets(cfg, str(file))
        return cfg

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """Validate nested plain data. Raises: ConfigError that names ``source``."""
        try:
            return cls.model_validate(_lists_to_tuples(_without_empty_sections(cls, values)))
        except ValidationError as error:
            raise ConfigError(f"{source}: {explain_errors(cls, error)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for YAML or JSON."""
        return self.model_dump(mode="json")

    def dump(self, file: Path) -> None:
        """Write the resolved settings as a YAML file that ``load`` reads."""
        file.write_text(dump_yaml(self.to_dict()))

    def science_settings(self) -> dict[str, Any]:
        """Return the science settings, ``dotted.key`` to value."""
        return {name: value for name, value, kind in self.iter_settings() if kind == "science"}

    def neutral_values(self, prefix: str = "") -> dict[str, Any]:
        """Return the value that equals absence, ``dotted.key`` to value, of the science settings that have one."""
        values: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if isinstance(field.json_schema_extra, dict) and "since" in field.json_schema_extra:
                values[f"{prefix}{name}"] = field.json_schema_extra["neutral"]
            inner = getattr(self, name)
            sections = {"": inner} if isinstance(inner, Config) else {}
            if isinstance(inner, tuple):
                sections = {
                    f".{number}": section for number, section in enumerate(inner) if isinstance(section, Config)
                }
            for suffix, section in sections.items():
                values |= section.neutral_values(f"{prefix}{name}{suffix}.")
        return values

    def keep_neutral_values(self, saved_science: Mapping[str, Any], prefix: str = "") -> Self:
        """Return the settings of a run that began before some of them existed.

        An added science setting gets the value that equals its absence if ``saved_science`` (by dotted name) lacks it
        or has that value, unless the YAML file or an override states it.
        """
        changed: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value, dotted, extra = getattr(self, name), f"{prefix}{name}", field.json_schema_extra
            if isinstance(extra, dict) and "since" in extra:
                if (
                    name not in self.model_fields_set
                    and saved_science.get(dotted, extra["neutral"]) == extra["neutral"]
                ):
                    changed[name] = _lists_to_tuples(extra["neutral"])
            elif isinstance(value, Config):
                changed[name] = value.keep_neutral_values(saved_science, f"{dotted}.")
            elif isinstance(value, tuple) and value and isinstance(value[0], Config):
                changed[name] = tuple(
                    section.keep_neutral_values(saved_science, f"{dotted}.{number}.")
                    for number, section in enumerate(value)
                )
        changed = {name: value for name, value in changed.items() if value != getattr(self, name)}
        return self.model_copy(update=changed) if changed else self

    def without_neutral(self, science: Mapping[str, Any]) -> dict[str, Any]:
        """Return science without the values that equal absence, as versions without those settings have it."""
        neutral = self.neutral_values()
        return {name: value for name, value in science.items() if name not in neutral or neutral[name] != value}

    def changed_science(self, prefix: str = "") -> list[str]:
        """Return the dotted names of the science settings with another value than their default, in their order."""
        names: list[str] = []
        for name, field in type(self).model_fields.items():
            value, dotted = getattr(self, name), f"{prefix}{name}"
            if get_setting_kind(field) == "machine":
                continue
            if isinstance(value, Config):
                names += value.changed_science(f"{dotted}.")
            elif isinstance(value, tuple) and value and isinstance(value[0], Config):
                names += [
                    inner
                    for number, section in enumerate(value)
                    if isinstance(section, Config)
                    for inner in section.changed_science(f"{dotted}.{number}.")
                ]
            elif value != field.get_default(call_default_factory=True):
                names.append(dotted)
        return names

    def to_flat_dict(self) -> dict[str, Any]:
        """Return every setting, ``dotted.key`` to value."""
        return {name: value for name, value, _ in self.iter_settings()}

    def iter_settings(self, prefix: str = "", inherited_kind: str | None = None) -> Iterator[tuple[str, Any, str]]:
        """Yield every setting as (dotted name, plain value, 'science' or 'machine')."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            kind = inherited_kind or get_setting_kind(field)
            inner_kind = "machine" if kind == "machine" else None
            if isinstance(value, Config):
                yield from value.iter_settings(f"{prefix}{name}.", inner_kind)
            elif isinstance(value, tuple) and value and isinstance(value[0], Config):
                for number, section in enumerate(value):
                    yield from section.iter_settings(f"{prefix}{name}.{number}.", inner_kind)
            else:
                yield f"{prefix}{name}", self.model_dump(mode="json", include={name})[name], kind


def get_setting_kind(field: FieldInfo) -> str:
    """Return 'science' or 'machine'; a field without a kind is science, the careful default."""
    extra = field.json_schema_extra
    return str(extra.get("half", "science")) if isinstance(extra, dict) else "science"


def _is_section(field: FieldInfo) -> bool:
    """Whether a field is a section, or a list of sections, that cannot be null."""
    inner = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is tuple else (field.annotation,)
    return any(isinstance(candidate, type) and issubclass(candidate, Config) for candidate in inner)


def explain_literal_secret(secret_description: str, *, in_url: bool = True) -> str:
    """Return why a literal secret in a setting is refused, and the remedy."""
    subject = "a URL with " if in_url else ""
    advice = "name an environment variable there, such as https://user:${PASSWORD}@host/folder"
    return (
        f"{subject}{secret_description} in it would be written into the run directory and into MLflow: "
        f"{advice if in_url else 'pass it to its library in the environment'}"
    )


def check_folder_name(setting: str, name: str) -> None:
    """Check that a setting is a plain folder name, without a path. Raises: ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"{setting}={name!r} is no plain name of a folder: a letter or digit, then letters, digits, '_', '-' "
            f"and '.'"
        )


def _refuse_secrets(cfg: Config, source: str) -> None:
    """Refuse literal secrets: the run directory and MLflow store the settings. Raises: ConfigError."""
    for setting, value in cfg.to_flat_dict().items():
        for name, secret in describe_secrets_in_settings(value, setting):
            raise ConfigError(f"{source}: {name}: {explain_literal_secret(secret, in_url=isinstance(value, str))}")


def _apply_overrides(
    tree: dict[str, Any], overrides: Sequence[str], sections: Container[str], alternatives: Sequence[str]
) -> dict[str, str]:
    """Set the values of ``dotted.key=value`` in order, under their new names; return the renamed ones, new by old.

    An override of one of the ``alternatives`` removes the others, unless overrides state these too.
    """
    renamed: dict[str, str] = {}
    overridden = {override.partition("=")[0].partition(".")[0] for override in overrides}
    new_names: set[str] = set()
    for override in overrides:
        name, value = _parse_override(override)
        assignments, override_renames = translate_override(name, value, sections)
        renamed |= override_renames
        new_names |= set() if override_renames else {name}
        for new_name, new_value in assignments:
            set_by_dotted_key(tree, new_name, new_value)
    if any(tree.get(name) for name in overridden.intersection(alternatives)):
        for replaced in set(alternatives) - overridden:
            tree.pop(replaced, None)
    if twice := [old for old, new in renamed.items() if new in new_names]:
        raise ConfigError(
            f"{twice[0]} and {renamed[twice[0]]} are one setting: leave out {twice[0]}, its name before 0.2"
        )
    return renamed


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"'{override}' is not an override; write dotted.key=value")
    try:
        return name, parse_yaml(text)
    except yaml.YAMLError:
        return name, text


def set_by_dotted_key(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested mappings and create missing sections. Raises: ConfigError if a section is a value."""
    *path, last = dotted_key.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"'{dotted_key}': '{part}' is a value, not a section")
    values[last] = value


def _without_empty_sections(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without sections that are null (``engine:``): they count as left out.

    A section that has settings without defaults becomes {}, so that the error names these settings.
    """
    stated: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        value, section = values.get(name), get_section_class(field)
        if value is None and _is_section(field):
            stated |= {name: {}} if field.is_required() else {}
        elif name in values:
            stated[name] = _without_empty_sections(section, value) if section and isinstance(value, dict) else value
    return stated | {name: value for name, value in values.items() if name not in model.model_fields}


def _lists_to_tuples(value: Any) -> Any:
    """Convert lists to tuples, at every depth: a frozen config has no mutable value."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    return tuple(_lists_to_tuples(inner) for inner in value) if isinstance(value, list) else value
