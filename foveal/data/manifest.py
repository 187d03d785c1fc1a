"""manifest.json: what a data set is. Its shards with their counts and sizes, its classes, its pixel statistics."""

import json
import os
from pathlib import Path, PurePosixPath

from pydantic import Field, field_validator

from foveal.config import Config
from foveal.errors import ConfigError, DataError

FORMAT = 1
NAME = "manifest.json"


class Shard(Config):
    """One tar file: samples and bytes in it, sha256 of the file where it is known, digest of its index."""

    file: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str | None = None
    index: str

    @field_validator("file")
    @classmethod
    def _plain(cls, file: str) -> str:
        if PurePosixPath(file).name != file or file in ("", ".."):
            raise ValueError("a shard is a plain file name in the data folder")
        return file


class Split(Config):
    """Samples that belong together, in the order of their shards."""

    samples: int = Field(ge=0)
    shards: tuple[Shard, ...]


class Manifest(Config):
    """A data set. mean and std are per channel, of training pixels in [0, 1]."""

    format: int = FORMAT
    name: str
    fields: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    splits: dict[str, Split]

    @field_validator("splits")
    @classmethod
    def _sums(cls, splits: dict[str, Split]) -> dict[str, Split]:
        for name, split in splits.items():
            if split.samples != sum(shard.samples for shard in split.shards):
                raise ValueError(f"split '{name}' says {split.samples} samples, its shards have another sum")
        return splits


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Errors: FileNotFoundError if there is none; DataError if it is damaged or of another format.
    """
    file = folder / NAME
    try:
        tree = json.loads(file.read_text())
        if not isinstance(tree, dict):
            raise TypeError("a JSON object is expected")
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): run `foveal data index` on its shards again") from None
    if tree.get("format") != FORMAT:
        raise DataError(f"{file} has format {tree.get('format')}, this foveal reads format {FORMAT}")
    try:
        return Manifest.checked(tree, str(file))
    except ConfigError as error:
        raise DataError(str(error)) from None


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest; the file appears whole or not at all."""
    draft = folder / f".{NAME}.{os.getpid()}"
    draft.write_text(json.dumps(manifest.tree(), indent=1, ensure_ascii=False) + "\n")
    draft.replace(folder / NAME)
