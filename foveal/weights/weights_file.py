"""Safetensors files of weights, as exports and other libraries have them."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_weights(file: Path, weights: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write weights; tied weights are written under each of their names. Raises: OSError, as for a full disk."""
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
        save_file(unshared, file, metadata)
    except SafetensorError as error:  # its only error here is that of the file system, which is no OSError
        raise OSError(f"{file.name}: {error}") from None
    file.chmod(mode)  # safetensors replaces the file by one that only its owner can read
