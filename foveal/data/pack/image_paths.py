"""Image files that a table names: existence, spelling, and repetition."""

import itertools
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.labels import ColumnLabels
from foveal.data.pack.writer import map_in_order
from foveal.errors import DataError
from foveal.redact import redact_url_secrets

_CHUNK = 256  # files per job that checks for missing files
_MAX_SHOWN = 200  # characters of a path in a message; a cell may hold a whole image as base64
_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # C:/ is no URL


def find_image_files(table: Path, names: Sequence[str], root: Path, workers: int) -> tuple[list[Path], list[str]]:
    """Return the image file of every row, and notes on names that are spelled otherwise than their files.

    Raises: DataError for a URL or a missing file, before hours of packing and not after.
    """
    for row, name in enumerate(names, 1):
        if _URL.match(name):
            raise DataError(
                f"{table}: row {row} names {redact_url_secrets(name)[:_MAX_SHOWN]}, a URL, and files are read from this "
                f"machine: download the images, and name their paths"
            )
    chunks = (names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK))
    spellings = map_in_order(partial(_find_spellings, root), chunks, workers)
    found = list(itertools.chain.from_iterable(spellings))
    for row, (name, spelling) in enumerate(zip(names, found, strict=True), 1):
        if spelling is None:
            longer = next((name + end for end in _ENDINGS if os.path.isfile(root / (name + end))), None)  # noqa: PTH113
            hint = "; a path of Windows is not known here" if re.match(r"[A-Za-z]:[\\/]|\\\\", name) else ""
            hint = f"; there is {longer}: write complete names" if longer else hint
            raise DataError(
                f"{table}: row {row} names {str(root / name)[:_MAX_SHOWN]}, and there is no such file; see --root{hint}"
            )
    files = [root / spelling for spelling in found if spelling is not None]
    respelled = [name for name, spelling in zip(names, found, strict=True) if name != spelling]
    notes = []
    if respelled:
        notes.append(
            f"{len(respelled):,} paths, such as {respelled[0][:_MAX_SHOWN]!a}, are spelled with backslashes or with "
            f"other Unicode composition than their files, which were found"
        )
    return files, notes


def find_repeated_files(
    table: Path, files: Sequence[Path], labels: ColumnLabels, split_names: Sequence[str] | None
) -> list[str]:
    """Return notes on images that several rows name. Raises: DataError if such rows have different labels."""
    first_rows: dict[str, int] = {}
    num_repeated = num_across_splits = 0
    for row, file in enumerate(files):
        first = first_rows.setdefault(os.path.normpath(file), row)
        if first == row:
            continue
        if labels[first] != labels[row]:
            raise DataError(
                f"{table}: row {row + 1} names {file}, as row {first + 1} does with another label: give every image one "
                f"row, and a list of classes if it has several"
            )
        num_repeated += 1
        num_across_splits += bool(split_names and split_names[first] != split_names[row])
    if not num_repeated:
        return []
    across = f", {num_across_splits:,} of them in another split" if num_across_splits else ""
    across = across if split_names else "; copies of an image may be in train and in val"
    return [f"{num_repeated:,} rows name the image of an earlier row and are packed again{across}"]


def _find_spellings(root: Path, names: Sequence[str]) -> list[str | None]:
    return [_find_spelling(root, name) for name in names]


def _find_spelling(root: Path, name: str) -> str | None:
    """Return the name under which a file exists: as given, with slashes, or in another Unicode composition."""
    slashed = name.replace("\\", "/")
    variants = (name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")))
    return next((variant for variant in dict.fromkeys(variants) if os.path.isfile(root / variant)), None)  # noqa: PTH113
