"""Encoder weights from other libraries: safetensors in one file or in parts with an index, read under timm's names.

Nothing is downloaded and no pickle is read.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveal.atomic import sha256
from foveal.errors import ExportError
from foveal.timeouts import DEFAULT_STALL_TIMEOUT, read_with_timeout
from foveal.weights.timm_names import rename_to_timm

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_BYTES = {torch.int8, torch.uint8}  # of quantised weights
_LEARNED = ("weight", "bias", "token", "embed", "embedding", "embeddings", "gamma")  # ends of names
_PICKLES = {".bin", ".pth", ".pt", ".ckpt", ".tar", ".pkl"}


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
    """Return the safetensors file, or the index of several: the path itself, or ``model.safetensors`` in the folder.

    stall_timeout: limit for storage without progress. Raises: ExportError, StorageUnreachableError.
    """
    return read_with_timeout(path, stall_timeout, lambda: _find_weights_file(path))


def _find_weights_file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in (_WEIGHTS, _INDEX) if (path / name).exists()), None)
        if found is None:
            raise ExportError(_explain_folder_without_weights(path))
        return found
    if not path.exists():
        raise ExportError(f"{path} is not there: give an export, or a file or folder with weights as safetensors")
    if path.name.endswith(".safetensors.index.json"):
        return path
    if path.suffix != ".safetensors":
        raise ExportError(f"{path} is no safetensors file; {_explain_conversion(path)}")
    if _PART.fullmatch(path.name):
        raise ExportError(f"{path} is one part of several; give its folder, where {_INDEX} names all parts")
    return path


def _explain_folder_without_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    hint = "weights are read from safetensors alone, no pickle"
    files = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if any(_PART.fullmatch(name) for name in files):
        hint = f"its parts are read through {_INDEX}, which is missing"
    elif files:
        hint = f"give the file that is meant, such as {folder / files[0]}"
    elif pickles:
        hint = _explain_conversion(folder / pickles[0])
    return f"{folder} has no {_WEIGHTS} (it has {', '.join(names[:5]) or 'no files'}); {hint}"


def _explain_conversion(file: Path) -> str:
    """Return the command that makes safetensors of a pickle; torch executes no code of the file (weights_only)."""
    target = file.with_suffix(".safetensors")
    return (
        f'a pickle is not read: convert it with safetensors.torch, for example by python -c "import torch; '
        f"from safetensors.torch import save_file; w = torch.load('{file}', 'cpu', weights_only=True); "
        f"w = w.get('state_dict', w.get('model', w)); "
        f"save_file({{k: v.clone().contiguous() for k, v in w.items() if torch.is_tensor(v)}}, '{target}')\""
    )


def read_weights_as_timm(
    file: Path, model_names: Collection[str], stall_timeout: float = DEFAULT_STALL_TIMEOUT
) -> ForeignWeights:
    """Return the weights of a file, or of the parts of an index, under timm's names.

    model_names: names of the weights of the model that is wanted (``rename_to_timm``). stall_timeout: limit for storage
    without progress. Raises: ExportError, StorageUnreachableError.
    """
    if file.suffix == ".json":
        parts = _read_index(file, stall_timeout)
        digests = {part: _digest(file.parent / part, stall_timeout) for part in sorted(parts)}
        digests[file.name] = _digest(file, stall_timeout)
        digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        tensors: dict[str, Tensor] = {}
        for part in sorted(parts):
            tensors |= _select(_load(file.parent / part, stall_timeout), parts[part], file, part)
    else:
        digest = _digest(file, stall_timeout)
        tensors = _load(file, stall_timeout)
    for name, value in tensors.items():
        if not _holds_real_numbers(name, value):
            raise ExportError(
                f"{file} has {name} of type {str(value.dtype).removeprefix('torch.')}, which is no floating-point "
                f"number; give the weights before they were quantised, as fp32, bf16 or fp16"
            )
    renamed = rename_to_timm({name: value.float() for name, value in tensors.items()}, file, model_names)
    return ForeignWeights(renamed.tensors, digest, renamed.notes, renamed.is_hugging_face)


def _holds_real_numbers(name: str, value: Tensor) -> bool:
    """Whether a tensor is of floating point, or one of a module's counters and indices, which are whole numbers."""
    is_quantised = value.dtype in _BYTES or name.endswith(_LEARNED)
    return value.is_floating_point() or not (is_quantised or value.is_complex())


def _digest(file: Path, stall_timeout: float) -> str:
    try:
        return read_with_timeout(file, stall_timeout, lambda: sha256(file))
    except OSError as error:
        raise ExportError(f"{file} cannot be read ({error})") from None


def _load(file: Path, stall_timeout: float) -> dict[str, Tensor]:
    try:
        return read_with_timeout(file, stall_timeout, lambda: load_file(file))
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
        if Path(part).suffix != ".safetensors":
            raise ExportError(f"{file} names {part}, which is no safetensors file; no pickle is read")
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
