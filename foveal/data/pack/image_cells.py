"""Columns of images in Arrow: paths of files, or the bytes of images with or without a path."""

import mmap
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import parquet

from foveal.data.image.decode import UndecodableError
from foveal.data.pack.label_cells import is_text
from foveal.data.pack.source import PackSample, SampleLabel, make_webdataset_key
from foveal.errors import DataError

_BATCH_ROWS = 64  # images in memory while a column is unpacked


def require_image_type(kind: pa.DataType, location: str) -> Literal["paths", "bytes"]:
    """Return what the cells of an image column hold. Raises: DataError that begins with ``location`` otherwise."""
    if is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        return "paths"
    if holds_image_bytes(kind):
        return "bytes"
    problem = f"is of type {str(kind)[:120]}"
    if "list" in str(kind).partition("<")[0]:
        problem += ": a row holds one image, so give every image a row of its own, or choose another column"
    else:
        problem += ": an image is a path, its bytes, or a struct of bytes and path; choose another with --image-column"
    raise DataError(f"{location} {problem}")


def holds_image_bytes(kind: pa.DataType) -> bool:
    """Whether cells are bytes, or structs of bytes and path as `datasets` stores images."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        stored = fields.get("bytes")
        return fields.keys() == {"path"} if stored is None else pa.types.is_null(stored) or _is_binary(stored)
    return _is_binary(kind)


def make_cell_sample(cell: Any, row: int, label: SampleLabel, root: Path, location: str) -> PackSample:
    """Return the sample of a cell: None, bytes, or {bytes, path}; relative paths start from ``root``."""
    values = cell if isinstance(cell, dict) else {"bytes": cell}
    stem = Path(values.get("path") or "image").stem
    return PackSample(make_webdataset_key(row, stem), None, label, partial(_read_cell, values, root), location)


def unpack_parquet_images(table: Path, column: str, folder: Path) -> pa.ChunkedArray:
    """Return a column of images, memory-mapped from an unnamed file in ``folder`` that lasts as long as the column.

    Samples are read in hashed order, and a compressed row group would be read again for each.
    Raises: DataError if the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with parquet.ParquetFile(table) as source, tempfile.TemporaryFile(dir=folder) as stream:
            schema = pa.schema([source.schema_arrow.field(column)])
            with pa.ipc.new_file(stream, schema) as writer:
                for batch in source.iter_batches(_BATCH_ROWS, columns=[column]):
                    writer.write_batch(batch.cast(schema))
            stream.flush()
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{table}: its images cannot be unpacked to {folder} ({error})") from None
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all().column(0)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _read_cell(values: dict[str, Any], root: Path) -> bytes:
    """Return the stored bytes of an image, or the bytes of the file at its path."""
    if values.get("bytes"):
        return values["bytes"]
    if not values.get("path"):
        raise UndecodableError("it has no image")
    file = Path(values["path"])
    return (file if file.is_absolute() else root / file).read_bytes()
