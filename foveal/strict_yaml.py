"""YAML as settings need it: no duplicate keys, numbers as in YAML 1.2, bounded in size, depth and time to read.

PyYAML reads YAML 1.1, in which 010 is 8, 1:30 is 90 and 1e-3 is a text.
"""

import difflib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from foveal.errors import ConfigError
from foveal.timeouts import call_with_timeout

_INT = re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_MAX_CHARACTERS = 1 << 18  # of a config
_MAX_VALUES = 100_000  # of a config
_MAX_DIGITS = 100  # of an integer
_READ_TIMEOUT = 20.0  # seconds to read a config file


class _StrictLoader(yaml.SafeLoader):
    """YAML where a duplicate key is an error, with the numbers of YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if duplicates := [key for key, count in keys.items() if count > 1]:
            raise ConfigError(f"line {node.start_mark.line + 1}: '{min(duplicates)}' is given twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0 if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)


class _StrictDumper(yaml.SafeDumper):
    """YAML that quotes every text that ``_StrictLoader`` would read as a number."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Double-quote a text with a Unicode line end, which YAML would fold and read as a blank."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    )


_StrictDumper.add_representer(str, _represent_str)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
for _yaml_class in (_StrictLoader, _StrictDumper):
    _yaml_class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern in (("int", _INT), ("float", _FLOAT)):  # an int matches both, and the first pattern decides
        _yaml_class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list("-+.0123456789"))


def dump_yaml(tree: Any) -> str:
    """Return plain data as YAML that ``parse_yaml`` reads."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


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
        raise ConfigError(f"{file}: no such file{suggest_file(file)}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: cannot be read: it is no text in UTF-8") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split()).replace(' in "<unicode string>"', "")
        raise ConfigError(f"{file}: not valid YAML ({problem})") from None


def _read_text(file: Path) -> str:
    with file.open() as stream:
        return stream.read(_MAX_CHARACTERS + 1)  # a limit, because a device file has no end


def suggest_file(file: Path) -> str:
    """Return `. Did you mean 'FILE'?` with the YAML file of the folder whose name is nearest; empty if none is near."""
    files = {near.stem: near for near in sorted(file.parent.glob("*.yaml"))} if file.parent.is_dir() else {}
    close = difflib.get_close_matches(file.stem, files, n=1)
    return f". Did you mean '{files[close[0]]}'?" if close else ""
