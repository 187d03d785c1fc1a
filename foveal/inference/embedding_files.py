"""Files of embeddings: numbered shards of features with the names of their images, and a manifest of what made them.

``embeddings.json`` is the manifest; ``features-00000-of-00012.parquet`` (or ``.npz``) is the first of twelve shards,
with the images 0 to ``shard_size`` - 1 of the list. A shard that exists is complete.
Parquet: columns ``image`` (text) and ``feature`` (list of float32; of patches the L x D values of float16, row by row).
npz: arrays ``image`` [n] and ``feature`` [n, D] or [n, L, D]. Both hold the unreadable images: as JSON under the key
``unreadable`` of Parquet's metadata, as arrays ``unreadable`` and ``reason``.
"""

import io
import json
import math
import secrets
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foveal.atomic import encode_json, fsync, write_atomic
from foveal.errors import ConfigError, DataError
from foveal.inference.decoding import UnreadableImage

MANIFEST = "embeddings.json"
FILE_FORMATS = ("parquet", "npz")
_FORMAT = 1
_UNREADABLE = b"unreadable"
_DAMAGES = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pa.ArrowException)  # of files that are cut


@dataclass(frozen=True)
class EmbeddingManifest:
    """All that the features depend on, and where they are.

    export: sha256 of the weights. images: number; images_sha256: of their names. transform: the fields of
    ``ImageTransform``. feature_shape: [D], or [L, D].
    """

    export: str
    feature: str
    layer: int
    feature_shape: list[int]
    transform: dict[str, Any]
    images: int
    images_sha256: str
    shard_size: int
    file_format: str
    format: int = _FORMAT

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.shard_size)

    def shard_file(self, folder: Path, number: int) -> Path:
        """Return the path of a shard."""
        return folder / f"features-{number:05d}-of-{self.num_shards:05d}.{self.file_format}"

    def shard_positions(self, number: int) -> range:
        """Return the positions in the list of images of those in a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.images))

    def missing_shards(self, folder: Path) -> list[int]:
        """Return the numbers of the shards that do not exist yet."""
        return [number for number in range(self.num_shards) if not self.shard_file(folder, number).exists()]


@dataclass(frozen=True)
class EmbeddingShard:
    """A shard: features [n, ...] of the images [n], and the images of its positions that cannot be read."""

    images: Sequence[str]
    features: np.ndarray
    unreadable: Sequence[UnreadableImage]


def join_embeddings(folder: Path, manifest: EmbeddingManifest) -> None:
    """Begin a folder of embeddings, or check that it is one of the same manifest. Every rank may call it at once.

    Raises: ConfigError for a folder of other embeddings or other files; DataError if it cannot be written.
    """
    file = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Listed before the manifest is looked for: another rank writes its shards after the manifest.
        others = [entry.name for entry in folder.iterdir() if not entry.name.startswith((".", MANIFEST))]
        if not file.exists():
            if others:
                raise ConfigError(f"{folder} holds other files and no {MANIFEST}: choose another --out")
            # Ranks in containers of several nodes may have one process id, and so one name of a draft.
            draft = folder / f".{MANIFEST}.{secrets.token_hex(8)}.draft"
            draft.write_bytes(encode_json(asdict(manifest)))
            fsync(draft)
            draft.replace(file)
    except OSError as error:
        raise cannot_write_error(folder, error) from None
    saved = read_manifest(folder)
    differing = [name for name, value in asdict(manifest).items() if asdict(saved)[name] != value]
    if differing:
        raise ConfigError(
            f"{folder} holds embeddings that were made otherwise (differing: {', '.join(differing)}): choose another "
            f"--out, or remove it"
        )


def read_manifest(folder: Path) -> EmbeddingManifest:
    """Return the manifest of a folder of embeddings. Raises: DataError."""
    file = folder / MANIFEST
    try:
        fields = json.loads(file.read_text())
        if fields.get("format") != _FORMAT:
            raise DataError(f"{file} has format {fields.get('format')}; this foveal reads format {_FORMAT}")
        return EmbeddingManifest(**fields)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no embeddings: it has no {MANIFEST}; `foveal embed` makes them") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file} cannot be read ({error}): make the embeddings again") from None


def write_shard(file: Path, shard: EmbeddingShard) -> None:
    """Write a shard; it exists when it is complete. Raises: DataError if it cannot be written."""
    encode = _encode_parquet if file.suffix == ".parquet" else _encode_npz
    try:
        write_atomic(file, encode(shard))
    except OSError as error:
        raise cannot_write_error(file, error) from None


def read_shard(file: Path, feature_shape: Sequence[int]) -> EmbeddingShard:
    """Return a shard. Raises: DataError if it is missing or damaged."""
    try:
        return _read_parquet(file, feature_shape) if file.suffix == ".parquet" else _read_npz(file)
    except _DAMAGES as error:
        raise DataError(f"{file} cannot be read ({error}): remove it, and run the same command again") from None


def read_unreadable(file: Path) -> list[UnreadableImage]:
    """Return the unreadable images of a shard, without reading its features. Raises: DataError."""
    try:
        if file.suffix == ".parquet":
            return _parse_unreadable(pq.read_metadata(file).metadata)
        with file.open("rb") as stream, np.load(stream) as arrays:  # numpy leaves a file that it cannot read open
            return _pair_unreadable(arrays)
    except _DAMAGES as error:
        raise DataError(f"{file} cannot be read ({error}): remove it, and run the same command again") from None


def iter_shards(folder: Path, manifest: EmbeddingManifest) -> Iterator[EmbeddingShard]:
    """Yield all shards in order. Raises: DataError if some are missing."""
    if missing := manifest.missing_shards(folder):
        raise DataError(
            f"{folder} lacks {len(missing):,} of its {manifest.num_shards:,} shards: run the command that began it again"
        )
    for number in range(manifest.num_shards):
        yield read_shard(manifest.shard_file(folder, number), manifest.feature_shape)


def cannot_write_error(path: Path, error: OSError) -> DataError:
    """Return the error of a full disk, for example; finished shards stay."""
    reason = error.strerror or str(error)
    return DataError(
        f"{path} cannot be written ({reason}): make room and run the same command again, which keeps finished shards"
    )


def _encode_parquet(shard: EmbeddingShard) -> bytes:
    features = shard.features.reshape(len(shard.images), math.prod(shard.features.shape[1:]))
    values = pa.array(np.ascontiguousarray(features).reshape(-1))
    table = pa.table(
        {
            "image": pa.array(list(shard.images), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
        }
    )
    rows = [[image.name, image.reason] for image in shard.unreadable]
    metadata = {_UNREADABLE: json.dumps(rows, ensure_ascii=False).encode()}
    stream = io.BytesIO()
    # Floats gain nothing from a dictionary, and little from compression.
    pq.write_table(table.replace_schema_metadata(metadata), stream, compression="none", use_dictionary=False)
    return stream.getvalue()


def _read_parquet(file: Path, feature_shape: Sequence[int]) -> EmbeddingShard:
    table = pq.read_table(file)
    images = table.column("image").to_pylist()
    values = table.column("feature").combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return EmbeddingShard(images, flat.reshape(len(images), *feature_shape), _parse_unreadable(table.schema.metadata))


def _parse_unreadable(metadata: "dict[bytes, bytes] | None") -> list[UnreadableImage]:
    return [UnreadableImage(name, reason) for name, reason in json.loads((metadata or {})[_UNREADABLE])]


def _encode_npz(shard: EmbeddingShard) -> bytes:
    stream = io.BytesIO()
    names, reasons = ([getattr(image, part) for image in shard.unreadable] for part in ("name", "reason"))
    np.savez(
        stream,
        image=np.array(shard.images, dtype=np.str_),
        feature=shard.features,
        unreadable=np.array(names, dtype=np.str_),
        reason=np.array(reasons, dtype=np.str_),
    )
    return stream.getvalue()


def _read_npz(file: Path) -> EmbeddingShard:
    with file.open("rb") as stream, np.load(stream) as arrays:  # nothing is unpickled
        return EmbeddingShard(arrays["image"].tolist(), arrays["feature"], _pair_unreadable(arrays))


def _pair_unreadable(arrays: Any) -> list[UnreadableImage]:
    pairs = zip(arrays["unreadable"].tolist(), arrays["reason"].tolist(), strict=True)
    return [UnreadableImage(name, reason) for name, reason in pairs]
