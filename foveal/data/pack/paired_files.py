"""What sources have in common whose images and labels are files of their own."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from foveal.data.pack.split_names import recognize_split
from foveal.data.pack.writer import map_in_order
from foveal.errors import ConfigError, DataError

_UNPAIRED_CHOICES = ("skip",)
_GENERIC_NAME = re.compile(r"(?:jpeg)?(?:images?|imgs?)|photos?|pictures?|data", re.IGNORECASE)
_CHUNK = 256  # files per job


def check_unpaired_choice(unpaired: str | None) -> None:
    """Raise ConfigError for an option ``unpaired`` that is none."""
    if unpaired not in (None, *_UNPAIRED_CHOICES):
        raise ConfigError(f"--unpaired {unpaired}: state {' or '.join(_UNPAIRED_CHOICES)}")


def name_dataset(folder: Path) -> str:
    """Return the name of a folder, or of the one above if it only says that it has images, or a split of them."""
    folder = folder.resolve()
    while (_GENERIC_NAME.fullmatch(folder.name) or recognize_split(folder.name)) and folder.parent.name:
        folder = folder.parent
    return folder.name


def digest_files(files: Sequence[tuple[str, Path]], workers: int, *further: object) -> str:
    """Return a digest of files, given as (name in the source, path), their sizes, and further plain data.

    Raises: DataError for a file that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(further).encode())
    chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
    for described in map_in_order(_describe_files, chunks, workers):
        digest.update(json.dumps(described).encode())
    return digest.hexdigest()


def _describe_files(files: Sequence[tuple[str, Path]]) -> list[tuple[str, int]]:
    described: list[tuple[str, int]] = []
    for name, file in files:
        try:
            described.append((unicodedata.normalize("NFC", name), file.stat().st_size))
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}): restore or remove it") from None
    return described
