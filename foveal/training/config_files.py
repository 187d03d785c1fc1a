"""The YAML files of configs/<kind>/: where a config is searched, which there are, and what each says about itself."""

import re
from collections.abc import Iterator
from pathlib import Path

from foveal.errors import ConfigError
from foveal.timeouts import call_with_timeout

SHIPPED_CONFIGS = Path(__file__).parents[1] / "configs"  # a link in a checkout, a folder in an installed package
LOCAL_CONFIGS = Path("configs")
YAML_SUFFIXES = (".yaml", ".yml")
_FIND_TIMEOUT = 20.0  # seconds, for a file system that does not answer


def find_config(kind: str, name_or_path: str) -> Path | None:
    """Return the file of a config, None if there is none; ``kind``: a stage, or another folder of configs/.

    A path is a path. NAME, <kind>/NAME and configs/<kind>/NAME, with .yaml or without, are searched in configs/<kind>/
    below the working directory, then among the configs that ship with foveal. Raises: ConfigError if storage hangs.
    """
    try:
        return call_with_timeout(_FIND_TIMEOUT, lambda: next(_iter_files(kind, name_or_path), None))
    except TimeoutError as error:
        raise ConfigError(f"{name_or_path}: cannot be read ({error})") from None


def _iter_files(kind: str, name_or_path: str) -> Iterator[Path]:
    """Yield the existing files that a name or path can mean, in the order of the search."""
    given = Path(name_or_path)
    if is_path(name_or_path) and _is_readable(given):
        yield given
    name = re.fullmatch(rf"(?:\./)?(?:(?:configs/)?{kind}/)?([^/]+?)(?:\.ya?ml)?", name_or_path)
    files = [folder / kind / f"{name[1]}.yaml" for folder in (LOCAL_CONFIGS, SHIPPED_CONFIGS)] if name else []
    yield from (file for file in files if _is_file(file))
    if _is_readable(given):  # a file without a suffix; a config of this name comes first
        yield given


def is_path(name_or_path: str) -> bool:
    """Return whether a text is written as a path, not as the name of a config."""
    return "/" in name_or_path or name_or_path.endswith(YAML_SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that cannot be entered
        return False


def _is_readable(path: Path) -> bool:
    """Return whether a path is no folder and exists, such as a file or a pipe; also if that cannot be told."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:
        return True  # reading it says why


def list_configs(kind: str) -> dict[str, Path]:
    """Return the configs of a kind by name: those below the working directory, then those that ship with foveal."""
    folders = (SHIPPED_CONFIGS / kind, LOCAL_CONFIGS / kind)
    return dict(sorted((file.stem, file) for folder in folders for file in sorted(folder.glob("*.yaml"))))


def read_summary(file: Path) -> str:
    """Return the first sentences of a config's comment, up to a line such as `# Command:`; empty without a comment."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#") or re.match(r"#\s*[A-Z]\w*: ", line):
            break
        lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)
