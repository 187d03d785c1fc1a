"""One typed, frozen, strict model per stage: YAML for values, Python for types, ``dotted.key=value`` for overrides.

A setting is science (it can change a result) unless its field says ``machine(...)`` (it cannot, beyond rounding).
Only science guards a resume; see ``Config.science``.
"""

import difflib
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from foveal.errors import ConfigError
from foveal.redact import find_secrets_in_settings
from foveal.timeouts import call_with_timeout

_MOST_TEXT, _MOST_VALUES, _MOST_DIGITS = 1 << 18, 100_000, 100  # characters, values, and digits of one, in a config
_PATIENCE = 20.0  # seconds that storage may take to begin with an answer


def science(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """A field whose value can change a result."""
    return Field(default, description=description, json_schema_extra={"half": "science"}, **constraints)


def machine(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """A field that changes where, how fast or how visibly a result is obtained, not the result."""
    return Field(default, description=description, json_schema_extra={"half": "machine"}, **constraints)


def _normalize_image_size(value: Any) -> Any:
    """One number for a square, so that a size has one form; what is none is left for the sentence below."""
    sides = value if isinstance(value, tuple) else (value,)
    if len(sides) > 2 or not sides or any(type(side) is not int or side < 1 for side in sides):
        given = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"a number of pixels or [height, width] is expected, each at least 1 (given: {given!r})")
    return sides[0] if sides[0] == sides[-1] else sides


_Pixels = Annotated[int, Field(ge=1)]
ImageSize = Annotated[_Pixels | tuple[_Pixels, _Pixels], BeforeValidator(_normalize_image_size)]


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """The sides of an ``ImageSize``, in pixels."""
    return size if isinstance(size, tuple) else (size, size)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error and 1e-3 is a number (YAML 1.1 wants 1.0e-3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise ConfigError(f"line {node.start_mark.line + 1}: '{min(twice)}' is given twice")
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Puts quotes round the text 1e3, which the loader above would read as a number."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Between double quotes where YAML would take one of Unicode's line ends for a fold, and read a blank."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    )


_StrictDumper.add_representer(str, _represent_str)
for _twin in (_StrictLoader, _StrictDumper):
    _twin.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


class Config(BaseModel):
    """The base of every section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def load(cls, file: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply ``dotted.key=value`` overrides, validate.

        Raises: ConfigError, one sentence that names the file and the key and, for a typo, the nearest setting; also
        for a secret that is written out, since the settings are written into the run directory.
        """
        tree = read_yaml(file)
        if not isinstance(tree, dict):
            raise ConfigError(f"{file}: a mapping of settings is expected, this is {type(tree).__name__}")
        for override in overrides:
            _apply_override(tree, override)
        cfg = cls.from_dict(tree, str(file))
        _refuse_secrets(cfg, str(file))
        return cfg

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """Validate a tree; ``where`` names its origin in the sentence of a mistake."""
        try:
            return cls.model_validate(_lists_to_tuples(values))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain_errors(cls, error)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for YAML or JSON."""
        return self.model_dump(mode="json")

    def dump(self, file: Path) -> None:
        """Write the resolved settings; the file can be given back to the same command."""
        file.write_text(yaml.dump(self.to_dict(), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120))

    def science_settings(self) -> dict[str, Any]:
        """The flat settings that can change a result, ``dotted.key`` to value."""
        return {name: value for name, value, half in self.iter_settings() if half == "science"}

    def to_flat_dict(self) -> dict[str, Any]:
        """Every setting, ``dotted.key`` to value."""
        return {name: value for name, value, _ in self.iter_settings()}

    def iter_settings(self, prefix: str = "", inherited_kind: str | None = None) -> Iterator[tuple[str, Any, str]]:
        """Every setting as (dotted name, plain value, 'science' or 'machine')."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            half = inherited_kind or get_setting_kind(field)
            below = "machine" if half == "machine" else None
            if isinstance(value, Config):
                yield from value.iter_settings(f"{prefix}{name}.", below)
            elif isinstance(value, tuple) and value and isinstance(value[0], Config):
                for number, inner in enumerate(value):
                    yield from inner.iter_settings(f"{prefix}{name}.{number}.", below)
            else:
                yield f"{prefix}{name}", self.model_dump(mode="json", include={name})[name], half


def get_setting_kind(field: FieldInfo) -> str:
    """'science' or 'machine'; a field that does not say is science, the careful default."""
    extra = field.json_schema_extra
    return str(extra.get("half", "science")) if isinstance(extra, dict) else "science"


def get_section_class(field: FieldInfo) -> type[Config] | None:
    """The Config class of a field that is a section (also of ``Section | None``), else nothing."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if (
            isinstance(candidate, type)
            and not isinstance(candidate, types.GenericAlias)
            and issubclass(candidate, Config)
        ):
            return candidate
    return None


def explain_written_secret(secret: str, *, in_url: bool = True) -> str:
    """Why a setting with a secret written out is refused, and what to do instead."""
    place = "a URL with " if in_url else ""
    advice = "name an environment variable there, such as https://user:${PASSWORD}@host/folder"
    return (
        f"{place}{secret} in it would be written into the run directory and into MLflow: "
        f"{advice if in_url else 'give it to the library that wants it in the environment'}"
    )


def check_folder_name(setting: str, name: str) -> None:
    """A name that becomes a folder's stays inside the one it is in. Raises: ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"{setting}={name!r} is no plain name of a folder: a letter or digit, then letters, digits, '_', '-' and '.'"
        )


def parse_yaml(text: str) -> Any:
    """Plain data from YAML.

    Raises: ConfigError for a key given twice and for more than a config can be, yaml.YAMLError for what is no YAML.
    """
    if len(text) > _MOST_TEXT:
        raise ConfigError(f"this is no config: it has more than {_MOST_TEXT:,} characters")
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_VALUES:
            raise ConfigError(
                f"this is no config: it has more than {_MOST_VALUES:,} values, those behind aliases included"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError("this is no config: it is nested too deeply, or inside of itself") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node has once its aliases are written out. Raises: RecursionError for one inside of itself."""
    if id(node) in known:
        return known[id(node)]
    inner = () if isinstance(node, yaml.ScalarNode) else node.value
    if not inner and node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits")
    parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
    known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    return known[id(node)]


def read_yaml(file: Path) -> Any:
    """Plain data from a YAML file. Raises: ConfigError, one sentence that names the file."""
    try:
        return parse_yaml(call_with_timeout(_PATIENCE, lambda: _read_text(file)))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file{_suggest_file(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None


def _refuse_secrets(cfg: Config, where: str) -> None:
    """Settings are written into the run directory and into MLflow: no secret may stand in them. Raises: ConfigError."""
    for setting, value in cfg.to_flat_dict().items():
        for name, what in find_secrets_in_settings(value, setting):
            raise ConfigError(f"{where}: {name}: {explain_written_secret(what, in_url=isinstance(value, str))}")


def _read_text(file: Path) -> str:
    with file.open() as stream:
        return stream.read(_MOST_TEXT + 1)  # of what has no end, too


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"'{override}' is not an override; write dotted.key=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    set_by_dotted_key(tree, name, value)


def set_by_dotted_key(values: dict[str, Any], dotted_key: str, value: Any) -> None:
    """Set ``a.b.c`` in a tree of mappings, making the sections on the way."""
    *path, last = dotted_key.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"'{dotted_key}': '{part}' is a value, not a section")
    values[last] = value


def _lists_to_tuples(value: Any) -> Any:
    """YAML has lists only; the models have tuples only, because a frozen config must be frozen to the leaf."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    return tuple(_lists_to_tuples(inner) for inner in value) if isinstance(value, list) else value


def _explain_errors(model: type[Config], error: ValidationError) -> str:
    """Every mistake as `key: what is wrong`, joined; a typo gets the nearest name."""
    return "; ".join(_explain_error(model, dict(problem)) for problem in error.errors())


def _explain_error(model: type[Config], problem: dict[str, Any]) -> str:
    place = [str(part) for part in problem["loc"]]
    name = ".".join(place) or "the file"
    if problem["type"] == "extra_forbidden":
        siblings = _setting_names_at(model, place[:-1])
        close = [name for name in siblings if name.startswith(place[-1])]
        close += difflib.get_close_matches(place[-1], siblings, n=1, cutoff=0.5)
        return f"{name} is not a setting. " + (
            f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(siblings)}"
        )
    if problem["type"] == "missing":
        return f"{name} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":  # our own checks name the values, and know which are secrets
        return f"{name}: {message}" if place else message
    return f"{name}: {message} (given: {problem['input']!r})"


def _setting_names_at(model: type[Config], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # one of a list of sections
            continue
        section = get_section_class(model.model_fields[part]) if part in model.model_fields else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _suggest_file(file: Path) -> str:
    names = [found.name for found in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, names, n=1)
    return f". Did you mean '{file.parent / close[0]}'?" if close else ""
