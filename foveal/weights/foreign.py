"""Encoder weights from other libraries, read under timm's names: safetensors and files of torch.save, also in parts.

Nothing is downloaded, and no code that a file names is run (``foveal.weights.torch_files``).
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveal.atomic import sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.state_dicts import read_flat_state_dict, select_state_dict
from foveal.weights.timm_names import rename_to_timm
from foveal.weights.torch_files import TORCH_SUFFIXES, load_torch_file

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TORCH_WEIGHTS, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # Hugging Face's before safetensors
_PART = re.compile(r".+-\d{5}-of-\d{5}\.(safetensors|bin)")
_BYTES = {torch.int8, torch.uint8}  # of quantised weights
_LEARNED = ("weight", "bias", "token", "embed", "embedding", "embeddings", "gamma")  # ends of names
T = TypeVar("T")


@dataclass(frozen=True)
class ForeignWeights:
    """Weights (fp32, CPU) under timm's names where these exist.

    ``sha256`` is the digest of the file, or of index and parts. ``notes`` say in words what was renamed or left out.
    ``is_hugging_face``: whether the file has Hugging Face's names.
    """

    tensors: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()
    is_hugging_face: bool = False

    def replace_tensors(self, tensors: dict[str, Tensor], *notes: str) -> "ForeignWeights":
        """Return the weights with other tensors and further notes."""
        return replace(self, tensors=tensors, notes=(*self.notes, *notes))


def find_weights_file(path: Path, stall_timeout: float = DEFAULT_STALL_TIMEOUT) -> Path:
    """Return the file of weights, or the index of several: the path itself, or the one with a usual name in the folder.

    stall_timeout: limit for storage without progress. Raises: ExportError, StorageUnreachableError.
    """
    return read_with_timeout(path, stall_timeout, lambda: _find_weights_file(path))


def _find_weights_file(path: Path) -> Path:
    if path.is_dir():
        found = next(
            (path / name for name in (_WEIGHTS, _INDEX, _TORCH_WEIGHTS, _TORCH_INDEX) if (path / name).exists()), None
        )
        if found is None:
            raise ExportError(_explain_folder_without_weights(path))
        return found
    if not path.exists():
        raise ExportError(f"{path} is not there: give an export, or a file or folder with weights")
    if path.name.endswith((".safetensors.index.json", ".bin.index.json")):
        return path
    if not is_weights_file(path):
        raise ExportError(
            f"{path} is no file of weights: foveal reads safetensors and files of torch.save "
            f"({', '.join(sorted(TORCH_SUFFIXES))})"
        )
    if _PART.fullmatch(path.name):
        index = _INDEX if path.suffix == ".safetensors" else _TORCH_INDEX
        raise ExportError(f"{path} is one part of several; give its folder, where {index} names all parts")
    return path


def is_weights_file(path: Path) -> bool:
    """Return whether a file has the suffix of safetensors or of torch.save."""
    return path.suffix == ".safetensors" or path.suffix in TORCH_SUFFIXES


def _explain_folder_without_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    hint = "give a file of weights, as safetensors or of torch.save"
    files = sorted(filter(is_weights_file, map(Path, names)), key=lambda file: file.suffix != ".safetensors")
    parts = [file for file in files if _PART.fullmatch(file.name)]
    if parts:
        index = _INDEX if parts[0].suffix == ".safetensors" else _TORCH_INDEX
        hint = f"its parts are read through {index}, which is missing"
    elif files:
        hint = f"give the file that is meant, such as {folder / files[0]}"
    return f"{folder} has no {_WEIGHTS} (it has {', '.join(names[:5]) or 'no files'}); {hint}"


def read_weights_as_timm(
    file: Path, model_names: Collection[str], stall_timeout: float = DEFAULT_STALL_TIMEOUT
) -> ForeignWeights:
    """Return the weights of a file, or of the parts of an index, under timm's names.

    model_names: names of the weights of the model that is wanted (``rename_to_timm``). stall_timeout: limit for storage
    without progress. Raises: ExportError, StorageUnreachableError.
    """
    notes: list[str] = []
    if file.suffix == ".json":
        parts = _read_index(file, stall_timeout)
        digests = {part: _digest(file.parent / part, stall_timeout) for part in sorted(parts)}
        digests[file.name] = _digest(file, stall_timeout)
        digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        tensors: dict[str, Tensor] = {}
        for part in sorted(parts):
            tensors |= _select(_load_part(file.parent / part, stall_timeout), parts[part], file, part)
    else:
        digest = _digest(file, stall_timeout)
        tensors, notes = _load(file, model_names, stall_timeout)
    for name, value in tensors.items():
        if not _holds_real_numbers(name, value):
            raise ExportError(
                f"{file} has {name} of type {str(value.dtype).removeprefix('torch.')}, which is no floating-point "
                f"number; give the weights before they were quantised, as fp32, bf16 or fp16"
            )
    renamed = rename_to_timm({name: value.float() for name, value in tensors.items()}, file, model_names)
    return ForeignWeights(renamed.tensors, digest, (*notes, *renamed.notes), renamed.is_hugging_face)


def _holds_real_numbers(name: str, value: Tensor) -> bool:
    """Whether a tensor is of floating point, or one of a module's counters and indices, which are whole numbers."""
    is_quantised = value.dtype in _BYTES or name.endswith(_LEARNED)
    return value.is_floating_point() or not (is_quantised or value.is_complex())


def _digest(file: Path, stall_timeout: float) -> str:
    try:
        return read_with_timeout(file, stall_timeout, lambda: sha256(file))
    except OSError as error:
        raise ExportError(f"{file} cannot be read ({error})") from None


def _load(file: Path, model_names: Collection[str], stall_timeout: float) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file, and for a checkpoint of torch.save which of its state dicts they are."""
    if file.suffix == ".safetensors":
        return _load_part(file, stall_timeout), []
    return _read(file, stall_timeout, lambda: select_state_dict(load_torch_file(file), file, model_names))


def _load_part(file: Path, stall_timeout: float) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return _read(file, stall_timeout, lambda: load_file(file))
    return _read(file, stall_timeout, lambda: read_flat_state_dict(load_torch_file(file), file))


def _read(file: Path, stall_timeout: float, read: Callable[[], T]) -> T:
    try:
        return read_with_timeout(file, stall_timeout, read)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None


def _read_index(file: Path, stall_timeout: float) -> dict[str, list[str]]:
    """Return the names of the weights by the file that holds them. Raises: ExportError for an index without files."""
    try:
        tree = read_with_timeout(file, stall_timeout, lambda: json.loads(file.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    weight_map = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{file} has no weight_map, which names the file of every weight; give the weights whole")
    parts: defaultdict[str, list[str]] = defaultdict(list)
    for name, part in weight_map.items():
        if not isinstance(part, str) or Path(part).name != part:
            raise ExportError(f"{file} names {part!r} as the file of {name}; a part is a file in the same folder")
        if not is_weights_file(Path(part)):
            raise ExportError(f"{file} names {part}, which is neither safetensors nor a file of torch.save")
        parts[part].append(name)
    missing = sorted(part for part in parts if not (file.parent / part).exists())
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ExportError(f"{file} names {missing[0]}{others}, which is not in the folder: the weights are incomplete")
    return parts


def _select(weights: dict[str, Tensor], names: list[str], index: Path, part: str) -> dict[str, Tensor]:
    absent = next((name for name in names if name not in weights), None)
    if absent is not None:
        raise ExportError(f"{index} says that {part} holds {absent}, which it does not; copy the weights again")
    return {name: weights[name] for name in names}
