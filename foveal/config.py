"""Settings: a typed, frozen, strict model per stage; YAML for values, ``dotted.key=value`` for overrides.

A setting is science (it can change a result) or, declared by ``machine(...)``, machine (it changes rounding at most).
A resume compares only science; see ``Config.science_settings``.
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
from foveal.redact import describe_secrets_in_settings
from foveal.timeouts import call_with_timeout

_MAX_CHARACTERS = 1 << 18  # of a config
_MAX_VALUES = 100_000  # of a config
_MAX_DIGITS = 100  # of an integer
_READ_TIMEOUT = 20.0  # seconds to read a config file


def science(default: Any = PydanticUndefined, description: str = "", **constraints: Any) -> Any:
    """Declare a setting whose value can change a result."""
    return Field(default, description=description, json_schema_extra={"half": "science"}, **constraints)


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


class _StrictLoader(yaml.SafeLoader):
    """YAML where a duplicate key is an error and 1e-3 is a number (YAML 1.1 requires 1.0e-3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            raise ConfigError(f"line {node.start_mark.line + 1}: '{min(duplicates)}' is given twice")
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """YAML that quotes the text 1e3, which ``_StrictLoader`` would read as a number."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Double-quote a text with a Unicode line end, which YAML would fold and read as a blank."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    )


_StrictDumper.add_representer(str, _represent_str)
for _yaml_class in (_StrictLoader, _StrictDumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


class Config(BaseModel):
    """Base class of every section: frozen, without unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def load(cls, file: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply ``dotted.key=value`` overrides, validate.

        Raises: ConfigError that names the file and the key and, for a typo, the nearest setting; also for a literal
        secret, because the run directory stores the settings.
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
        """Validate nested plain data. Raises: ConfigError that names ``source``."""
        try:
            return cls.model_validate(_lists_to_tuples(values))
        except ValidationError as error:
            raise ConfigError(f"{source}: {_explain_errors(cls, error)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for YAML or JSON."""
        return self.model_dump(mode="json")

    def dump(self, file: Path) -> None:
        """Write the resolved settings as a YAML file that ``load`` reads."""
        file.write_text(yaml.dump(self.to_dict(), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120))

    def science_settings(self) -> dict[str, Any]:
        """Return the science settings, ``dotted.key`` to value."""
        return {name: value for name, value, kind in self.iter_settings() if kind == "science"}

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


def get_section_class(field: FieldInfo) -> type[Config] | None:
    """Return the Config class of a section field (also of ``Section | None``), else None."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if (
            isinstance(candidate, type)
            and not isinstance(candidate, types.GenericAlias)
            and issubclass(candidate, Config)
        ):
            return candidate
    return None


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


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain data.

    Raises: ConfigError for a duplicate key or a text over the limits of a config; yaml.YAMLError for invalid YAML.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(f"this is no config: it has more than {_MAX_CHARACTERS:,} characters")
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_VALUES:
            raise ConfigError(
                f"this is no config: it has more than {_MAX_VALUES:,} values, those behind aliases included"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigError("this is no config: it is nested too deeply, or inside of itself") from None
    except (ValueError, OverflowError) as error:  # an impossible date, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values of a node with its aliases expanded. Raises: RecursionError for a node that contains itself."""
    if id(node) in counts:
        return counts[id(node)]
    items = () if isinstance(node, yaml.ScalarNode) else node.value
    if not items and node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(node.value)} digits")
    children = [child for item in items for child in (item if isinstance(item, tuple) else (item,))]
    counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def read_yaml(file: Path) -> Any:
    """Read plain data from a YAML file. Raises: ConfigError that names the file."""
    try:
        return parse_yaml(call_with_timeout(_READ_TIMEOUT, lambda: _read_text(file)))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file{_suggest_file(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from None


def _refuse_secrets(cfg: Config, source: str) -> None:
    """Refuse literal secrets: the run directory and MLflow store the settings. Raises: ConfigError."""
    for setting, value in cfg.to_flat_dict().items():
        for name, secret in describe_secrets_in_settings(value, setting):
            raise ConfigError(f"{source}: {name}: {explain_literal_secret(secret, in_url=isinstance(value, str))}")


def _read_text(file: Path) -> str:
    with file.open() as stream:
        return stream.read(_MAX_CHARACTERS + 1)  # a limit, because a device file has no end


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
    """Set ``a.b.c`` in nested mappings and create missing sections. Raises: ConfigError if a section is a value."""
    *path, last = dotted_key.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"'{dotted_key}': '{part}' is a value, not a section")
    values[last] = value


def _lists_to_tuples(value: Any) -> Any:
    """Convert lists to tuples, at every depth: a frozen config has no mutable value."""
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    return tuple(_lists_to_tuples(inner) for inner in value) if isinstance(value, list) else value


def _explain_errors(model: type[Config], error: ValidationError) -> str:
    """Return every error as `key: message`, joined; a typo gets the nearest setting's name."""
    return "; ".join(_explain_error(model, dict(problem)) for problem in error.errors())


def _explain_error(model: type[Config], problem: dict[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) or "the file"
    if problem["type"] == "extra_forbidden":
        siblings = _setting_names_at(model, path[:-1])
        close = [name for name in siblings if name.startswith(path[-1])]
        close += difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.5)
        return f"{name} is not a setting. " + (
            f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(siblings)}"
        )
    if problem["type"] == "missing":
        return f"{name} is missing and has no default"
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    message = message[0].lower() + message[1:]
    if problem["type"] == "value_error":  # foveal's own checks state the values, except secrets
        return f"{name}: {message}" if path else message
    return f"{name}: {message} (given: {problem['input']!r})"


def _setting_names_at(model: type[Config], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # an index into a list of sections
            continue
        section = get_section_class(model.model_fields[part]) if part in model.model_fields else None
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _suggest_file(file: Path) -> str:
    names = [candidate.name for candidate in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
    close = difflib.get_close_matches(file.name, names, n=1)
    return f". Did you mean '{file.parent / close[0]}'?" if close else ""
