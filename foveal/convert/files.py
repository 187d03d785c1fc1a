"""Files of converted exports, and the libraries that write them."""

import importlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.errors import ExportError
from foveal.weights import weights_file


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
    """Write safetensors with the mark of PyTorch's weights, which transformers asks for. Raises: OSError."""
    weights_file.write_weights(file, weights, {"format": "pt"} | (metadata or {}))


def write_config(file: Path, config: dict[str, Any]) -> None:
    """Write JSON in UTF-8, as timm and transformers read it. Raises: OSError."""
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
