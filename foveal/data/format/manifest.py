"""manifest.json: what a data set is. Its shards with their counts and sizes, its classes, its pixel statistics."""

from pathlib import Path
from tarfile import BLOCKSIZE

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from foveal.atomic import write_json
from foveal.config import Config
from foveal.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_MAX_NAME_BYTES = 255 - len(".index")  # bytes of a file's name


# Not a Config: 200,000 of them would take three times the memory and the time.
@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Shard:
    """One tar file: samples and bytes in it, sha256 of the file where it is known, digest of its index."""

    file: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1, le=1 << 53)
    sha256: str | None = Field(default=None, kw_only=True)
    index: str = Field(kw_only=True)

    @field_validator("file")
    @classmethod
    def _plain(cls, file: str) -> str:
        if "/" in file or "\0" in file or file in ("", ".", "..") or len(file.encode()) > _MAX_NAME_BYTES:
            raise ValueError("a shard is a plain file name in the data folder")
        return file

    @field_validator("bytes")
    @classmethod
    def _room(cls, size: int, info: ValidationInfo) -> int:
        if info.data.get("samples", 0) * BLOCKSIZE > size:
            raise ValueError(f"{size} bytes have no room for {info.data['samples']} samples")
        return size


class Split(Config):
    """Samples that belong together, in the order of their shards."""

    samples: int = Field(ge=0)
    shards: tuple[Shard, ...]


class Manifest(Config):
    """A data set. mean and std are per channel, of training pixels in [0, 1]."""

    format: int = Field(default=FORMAT_VERSION, ge=FORMAT_VERSION, le=FORMAT_VERSION)
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

    Raises: FileNotFoundError if there is none; DataError if it is damaged or of another format.
    """
    return parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))


def parse_manifest(text: bytes, location: str) -> Manifest:
    """The manifest in a text that came from ``where``. Raises: DataError as ``read_manifest``."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _format_error(location, error) from None
    if "format" not in manifest.model_fields_set:
        raise DataError(f"{location} has format None, this foveal reads format {FORMAT_VERSION}")
    return manifest


def _format_error(where: str, error: ValidationError) -> DataError:
    """The first mistake, in one sentence: one slip of whoever wrote a manifest may repeat for every shard."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if place == "format":
        return DataError(f"{where} has format {first['input']}, this foveal reads format {FORMAT_VERSION}")
    again = "run `foveal data index` on its shards again"
    if not place:
        return DataError(f"{where} is damaged ({' '.join(first['msg'].split())}): {again}")
    said = {"missing": "is missing", "extra_forbidden": "is not a setting"}.get(first["type"])
    return DataError(f"{where}: {place} {said or first['msg'].removeprefix('Value error, ')}: {again}")


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest; the file appears whole or not at all."""
    write_json(folder / MANIFEST_NAME, manifest.to_dict())
