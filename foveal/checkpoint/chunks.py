"""The checkpoint format of every engine, world size and ZeRO stage: ranges of elements under the module's names.

Each rank writes a safetensors file of its ranges; a reader takes the ranges that it needs from all files. No pickle is
written or read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveal.errors import CheckpointError, StorageUnreachableError

_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorChunk:
    """A range of consecutive elements of one tensor on this rank, as live flat views: filling them fills the engine.

    ``start`` is the first element's index in the flat tensor of ``shape``. ``tensors`` are "weight" and, for a trained
    parameter, the optimizer's moments under their names in its state (AdamW: "exp_avg" and "exp_avg_sq"), flat and
    equally long. A rank lists every tensor of the module, also with an empty range, so that every rank detects
    missing and surplus tensors. ``relative_write_range`` is the part that this rank writes, relative to ``start``: of several
    ranks with the same elements only one writes them.
    """

    name: str
    shape: tuple[int, ...]
    flat_start: int
    flat_views_by_part: dict[str, Tensor]
    relative_write_range: tuple[int, int]


def replicated_chunk(name: str, tensors_by_part: dict[str, Tensor], rank: int, world_size: int) -> TensorChunk:
    """Return the chunk of a tensor that every rank holds in full; each rank writes an equal part."""
    shape = tuple(tensors_by_part["weight"].shape)
    size = math.prod(shape)
    flat = {part: value.detach().view(-1) for part, value in tensors_by_part.items()}
    return TensorChunk(name, shape, 0, flat, (size * rank // world_size, size * (rank + 1) // world_size))


def chunk_file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"pieces-{rank:05d}.safetensors"


def write_and_hash_chunks(folder: Path, rank: int, chunks: Sequence[TensorChunk]) -> str:
    """Write this rank's part of the chunks to its file and fsync; return the sha256 of the file's bytes, in hex.

    foveal writes the safetensors file itself to allocate its space before the first byte (a full disk or an exceeded
    quota fails at once) and to digest the bytes in memory, not those on disk. Raises: OSError.
    """
    ranges = {
        f"{part} {chunk.flat_start + chunk.relative_write_range[0]} {chunk.name}": value[
            slice(*chunk.relative_write_range)
        ]
        for chunk in chunks
        if chunk.relative_write_range[0] < chunk.relative_write_range[1]
        for part, value in chunk.flat_views_by_part.items()
    }
    order = sorted(ranges, key=lambda key: -ranges[key].element_size())  # aligns every range to its element size
    shapes = json.dumps({chunk.name: chunk.shape for chunk in chunks})
    header: dict[str, Any] = {"__metadata__": {"shapes": shapes}}
    end = 0
    for key in order:
        values = ranges[key]
        begin = end
        end += values.nbytes
        header[key] = {"dtype": _DTYPES[values.dtype], "shape": [len(values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (folder / chunk_file_name(rank)).open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + end)
        for content in (len(text).to_bytes(8, "little"), text, *(_tensor_bytes(ranges[key]) for key in order)):
            stream.write(content)
            digest.update(content)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def stored_parts(folder: Path) -> dict[str, set[str]]:
    """Return the parts ("weight", moments) that a folder has of every tensor with elements, by its name."""
    parts: dict[str, set[str]] = {}
    for part, name in _ChunkIndex.from_folder(folder).stored:
        parts.setdefault(name, set()).add(part)
    return parts


def load_chunks(folder: Path, target_chunks: Sequence[TensorChunk], *, weights_only: bool = False) -> None:
    """Fill chunks from a folder, however its files divide the tensors; changes nothing unless all chunks fit.

    ``weights_only``: leave the moments as they are, whatever moments the folder has.
    Raises: CheckpointError that names a tensor which is missing, surplus, incomplete, or of another shape or dtype.
    """
    index = _ChunkIndex.from_folder(folder)
    if weights_only:
        index = replace(index, stored={key: ranges for key, ranges in index.stored.items() if key[0] == "weight"})
        target_chunks = [
            replace(chunk, flat_views_by_part={"weight": chunk.flat_views_by_part["weight"]}) for chunk in target_chunks
        ]
    index.check(target_chunks)
    reads: dict[Path, list[tuple[str, slice, Tensor]]] = {}
    for chunk in target_chunks:
        for part, value in chunk.flat_views_by_part.items():
            for stored in index.stored.get((part, chunk.name), []):
                begin = max(chunk.flat_start, stored.start)
                end = min(chunk.flat_start + len(value), stored.stop)
                if begin < end:
                    source = slice(begin - stored.start, end - stored.start)
                    target = value[begin - chunk.flat_start : end - chunk.flat_start]
                    reads.setdefault(stored.file, []).append((f"{part} {stored.start} {chunk.name}", source, target))
    for file, file_reads in reads.items():
        with _open_safetensors(file) as handle:
            for key, source, target in file_reads:
                target.copy_(handle.get_slice(key)[source])


@dataclass(frozen=True, slots=True)
class _StoredChunk:
    start: int
    stop: int
    dtype: str
    file: Path


@dataclass(frozen=True, slots=True)
class _ChunkIndex:
    """The tensors and ranges in a folder's files, read from their headers."""

    folder: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    stored: dict[tuple[str, str], list[_StoredChunk]] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> "_ChunkIndex":
        index = cls(folder)
        for file in sorted(folder.glob("pieces-*.safetensors")):
            with _open_safetensors(file) as handle:
                index.shapes.update(
                    (name, tuple(shape)) for name, shape in json.loads(handle.metadata()["shapes"]).items()
                )
                for key in handle.keys():  # noqa: SIM118 - the handle is not iterable
                    part, start, name = key.split(" ", 2)
                    values = handle.get_slice(key)
                    stored = _StoredChunk(int(start), int(start) + values.get_shape()[0], values.get_dtype(), file)
                    index.stored.setdefault((part, name), []).append(stored)
        for stored_chunks in index.stored.values():
            stored_chunks.sort(key=lambda stored: stored.start)
        return index

    def check(self, chunks: Sequence[TensorChunk]) -> None:
        """Check that the folder holds exactly these chunks' tensors. Raises: CheckpointError."""
        by_name = {chunk.name: chunk for chunk in chunks}
        for name in [*by_name, *sorted(self.shapes.keys() - by_name.keys())]:
            if name not in by_name or name not in self.shapes:
                fault = (
                    f"has {name}, which the model lacks"
                    if name not in by_name
                    else f"lacks {name}, which the model has"
                )
                raise CheckpointError(
                    f"{self.folder} {fault}; continue with the model that it was saved from, or start anew with "
                    f"another run.dir"
                )
            self._check_chunk(by_name[name])

    def _check_chunk(self, chunk: TensorChunk) -> None:
        name, shape = chunk.name, self.shapes[chunk.name]
        if shape != chunk.shape:
            raise CheckpointError(
                f"{self.folder} has {name} in shape {list(shape)}, the model in {list(chunk.shape)}; continue with the "
                f"model that it was saved from"
            )
        size = math.prod(shape)
        parts = (
            {part for part, stored_name in self.stored if stored_name == name}
            if size
            else chunk.flat_views_by_part.keys()
        )
        if parts != chunk.flat_views_by_part.keys():
            before = "trained" if len(parts) > 1 else "frozen"
            now = "trained" if len(chunk.flat_views_by_part) > 1 else "frozen"
            raise CheckpointError(f"{name} was {before} when {self.folder} was saved and is {now} now; set it back")
        for part, value in chunk.flat_views_by_part.items():
            stored_chunks = self.stored.get((part, name), [])
            end = 0
            for stored in [*stored_chunks, _StoredChunk(size, size, "", self.folder)]:
                if stored.start != end:
                    fault = (
                        f"lacks elements {end} to {stored.start - 1}"
                        if stored.start > end
                        else f"has element {stored.start} twice"
                    )
                    raise CheckpointError(
                        f"{self.folder} is incomplete: it {fault} of {name} ({part}, {size} elements); remove it to "
                        f"continue from the checkpoint before"
                    )
                end = stored.stop
            for stored in stored_chunks:
                if stored.dtype != _DTYPES[value.dtype]:
                    raise CheckpointError(
                        f"{stored.file} has {name} ({part}) as {stored.dtype}, the model as {_DTYPES[value.dtype]}; "
                        f"continue with the model that it was saved from"
                    )


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); remove its folder to continue from the checkpoint before"
        ) from None
    except OSError as error:
        raise StorageUnreachableError(f"{file} cannot be read ({error})") from None


def _tensor_bytes(values: Tensor) -> memoryview:
    """Return a tensor's bytes, without a copy if the tensor is on the CPU."""
    return values.cpu().view(torch.uint8).numpy().data
