"""A folder that exists whole or not at all: written as a draft, forced to disk, named by one rename."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22


def sha256(file: Path) -> str:
    """The digest of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def force(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old text or the new, never a part."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    force(draft)
    draft.replace(file)
    force(file.parent)


def draft_of(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, so that the rename stays on one file system."""
    return folder.with_name(f".draft-{folder.name}")


def publish(draft: Path, folder: Path) -> None:
    """Give a finished draft its name; what had the name before is gone only after the new one is whole on disk."""
    for names in [*(each for each in draft.rglob("*") if each.is_dir()), draft]:
        force(names)
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old)
    else:
        draft.rename(folder)
    force(folder.parent)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Yield an empty draft folder; publish it if the block ends well, remove it if not."""
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            force(file)
        publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
