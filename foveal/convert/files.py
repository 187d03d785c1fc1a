"""Files of converted exports, and the libraries that write them."""

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from foveal.errors import ExportError


def import_extra(library: str) -> Any:
    """Return a library of the extra ``foveal[export]``. Raises: ExportError if it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ExportError(
            f"this format needs {library.partition('.')[0]}, which is not installed: pip install 'foveal[export]'"
        ) from None


def describe_library(name: str) -> str:
    """Return a library's name and version."""
    return f"{name} {importlib.metadata.version(name)}"


def write_weights(file: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write weights as safetensors; tied weights are written under each of their names. Raises: OSError."""
    unshared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in weights.items():
        contiguous = value.detach().contiguous()
        storage = contiguous.untyped_storage().data_ptr()
        unshared[name] = contiguous.clone() if storage in storages else contiguous
        storages.add(storage)
    file.touch()
    mode = file.stat().st_mode  # as the umask says
    try:
        save_file(unshared, file, {"format": "pt"} | (metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{file.name}: {error}") from None
    file.chmod(mode)  # safetensors replaces the file by one that only its owner can read


def write_config(file: Path, config: dict[str, Any]) -> None:
    """Write JSON in UTF-8, as timm and transformers read it. Raises: OSError."""
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
