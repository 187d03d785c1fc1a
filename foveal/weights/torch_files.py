"""Files of torch.save as tensors, without running code that they name (``torch.load`` with ``weights_only``)."""

import argparse
import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from foveal.errors import ExportError

TORCH_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".th", ".tar", ".pkl"}  # .tar: model.pth.tar of many training scripts

# torch's allow list has tensors, their storages and plain containers. Training scripts (MAE, DINO, DeiT) store their options
# as a Namespace beside them. It is harmless: a bag of attributes. Its constructor only sets them, it has no __setstate__,
# __getattr__ or __del__, and what it holds passes the same allow list. Nothing here reads it.
_HARMLESS_CLASSES: list[Any] = [argparse.Namespace]
_ZIP_MAGIC = b"PK\x03\x04"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")
_MAX_GLOBALS = 5
_MAX_DETAIL = 160  # characters of torch's own message


def load_torch_file(file: Path) -> Any:
    """Return the objects in a file of torch.save, on the CPU. Tensors of the zip format are mapped, not yet read.

    Raises: ExportError for a file that is none, or that needs more than weights; OSError.
    """
    with file.open("rb") as opened:
        is_zip = opened.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    # Typed storages and TorchScript make torch warn.
    with warnings.catch_warnings(), _allow_only(_HARMLESS_CLASSES):
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - a damaged pickle can make the unpickler raise anything
            raise ExportError(_explain(file, str(error) or type(error).__name__)) from None


@contextlib.contextmanager
def _allow_only(classes: list[Any]) -> Iterator[None]:
    """Allow these classes beside torch's own list, and none that an imported library has added."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _explain(file: Path, message: str) -> str:
    """Return why torch refused a file, in one sentence."""
    refused = _find_refused_globals(file, message)
    if refused:
        names = ", ".join(refused[:_MAX_GLOBALS])
        more = f" and {len(refused) - _MAX_GLOBALS} more" if len(refused) > _MAX_GLOBALS else ""
        return (
            f"{file} holds more than weights: it asks for {names}{more}, and foveal runs nothing that a file names; load "
            f"it where it comes from and save its state dict alone, for example as safetensors"
        )
    if "TorchScript" in message:
        return f"{file} is a TorchScript archive, which holds code beside weights; give its state dict"
    if ".tar format" in message:
        return (
            f"{file} has the tar format of torch's first releases, which cannot be read as weights alone; save it again"
        )
    detail = " ".join(message.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].split())
    return f"{file} cannot be read as a file of torch.save ({detail[:_MAX_DETAIL]})"


def _find_refused_globals(file: Path, message: str) -> list[str]:
    """Return the names of classes and functions that a file asks for beyond the allow list."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # noqa: BLE001 - not the zip format, or damaged: torch names the first
        return _REFUSED_GLOBAL.findall(message)
