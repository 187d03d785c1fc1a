"""manifest.json of a data set: shards with sample counts and sizes, class names, pixel statistics."""

import hashlib
from pathlib import Path
from tarfile import BLOCKSIZE

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from foveal.atomic import write_json
from foveal.config import Config
from foveal.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_MAX_NAME_BYTES = 255 - len(".index")  # 255: limit of a file name; `<shard>.index` must fit too


# A dataclass, not a Config: 200,000 Config instances would take three times the memory and the time.
@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Shard:
    """Entry of one tar file: number of samples, size in bytes, sha256 (null: unknown), digest of the shard's index."""

    file: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1, le=1 << 53)
    sha256: str | None = Field(default=None, kw_only=True)
    index: str = Field(kw_only=True)

    @field_validator("file")
    @classmethod
    def _check_file_name(cls, file: str) -> str:
        if "/" in file or "\0" in file or file in ("", ".", "..") or len(file.encode()) > _MAX_NAME_BYTES:
            raise ValueError("a shard is a plain file name in the data folder")
        return file

    @field_validator("bytes")
    @classmethod
    def _check_bytes(cls, size: int, info: ValidationInfo) -> int:
        if info.data.get("samples", 0) * BLOCKSIZE > size:
            raise ValueError(f"{size} bytes have no room for {info.data['samples']} samples")
        return size


class Split(Config):
    """Named part of a data set (train, val, ...); sample order is shard order."""

    samples: int = Field(ge=0)
    shards: tuple[Shard, ...]

    @property
    def samples_digest(self) -> str:
        """The sha256 over keys, sizes and labels of the samples; independent of the folder."""
        return hashlib.sha256("".join(shard.index for shard in self.shards).encode()).hexdigest()


class Manifest(Config):
    """Content of manifest.json; mean and std are per channel, of training pixels in [0, 1].

    bit_depth: bits that the pixels of images stored in 16 bits use (None: 16; images that leave the upper 2 unused are refused).
    """

    format: int = Field(default=FORMAT_VERSION, ge=FORMAT_VERSION, le=FORMAT_VERSION)
    name: str
    fields: tuple[str, ...]
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bit_depth: int | None = Field(default=None, ge=9, le=16)
    splits: dict[str, Split]

    @field_validator("splits")
    @classmethod
    def _check_sample_counts(cls, splits: dict[str, Split]) -> dict[str, Split]:
        for name, split in splits.items():
            if split.samples != sum(shard.samples for shard in split.shards):
                raise ValueError(f"split '{name}' says {split.samples} samples, its shards have another sum")
        return splits


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder.

    Raises: FileNotFoundError if the file is missing; DataError if it is damaged or has another format version.
    """
    return parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))


def parse_manifest(text: bytes, location: str) -> Manifest:
    """Parse a manifest read from ``location``. Raises: DataError as ``read_manifest``."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _format_error(location, error) from None
    if "format" not in manifest.model_fields_set:
        raise DataError(f"{location} has format None, this foveal reads format {FORMAT_VERSION}")
    return manifest


def _format_error(location: str, error: ValidationError) -> DataError:
    """Return the first validation error as one sentence: the same mistake may repeat for every shard."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if key == "format":
        return DataError(f"{location} has format {first['input']}, this foveal reads format {FORMAT_VERSION}")
    remedy = "run `foveal data index` on its shards again"
    if not key:
        return DataError(f"{location} is damaged ({' '.join(first['msg'].split())}): {remedy}")
    problem = {"missing": "is missing", "extra_forbidden": "is not a setting"}.get(first["type"])
    return DataError(f"{location}: {key} {problem or first['msg'].removeprefix('Value error, ')}: {remedy}")


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest`` to ``folder`` atomically."""
    tree = manifest.to_dict()
    if manifest.bit_depth is None:
        del tree["bit_depth"]  # foveal 0.1 refuses names that it does not know
    write_json(folder / MANIFEST_NAME, tree)
