"""The one checkpoint format of every engine, rank count and ZeRO stage: runs of elements under the module's own names.

Each rank writes a safetensors file of the runs that it holds; a reader takes the ranges that it needs from all of
them, whoever wrote them. No pickle is written or read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """A run of consecutive elements of one tensor that this rank holds, as live flat views: filling it fills the engine.

    ``parts`` are "weight" and, for what is trained, the optimizer's moments ("exp_avg" and "exp_avg_sq" of AdamW,
    "momentum_buffer" of SGD and LARS), flat and equally long. A rank lists every tensor of the module, those too of which
    it holds nothing, so that what is missing or left over shows on every rank. ``writes`` is what it writes of the run,
    counted from ``start``: where several ranks hold the same elements, one of them writes them.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]
    write_range: tuple[int, int]


def replicated_chunk(name: str, tensors: dict[str, Tensor], rank: int, world_size: int) -> TensorChunk:
    """A tensor that every rank holds alike, whole: each writes its share."""
    shape = tuple(tensors["weight"].shape)
    size = math.prod(shape)
    flat = {part: value.detach().view(-1) for part, value in tensors.items()}
    return TensorChunk(name, shape, 0, flat, (size * rank // world_size, size * (rank + 1) // world_size))


def chunk_file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"pieces-{rank:05d}.safetensors"


def write_chunks(folder: Path, rank: int, chunks: Sequence[TensorChunk]) -> str:
    """Write what this rank writes of its pieces, forced to disk; the sha256 of the file's bytes, in hex.

    Written here and not by the library, to have room set aside before the first byte (a full disk or a spent quota
    shows at once) and the digest of what was meant to be written. Raises: OSError.
    """
    runs = {
        f"{part} {piece.start + piece.write_range[0]} {piece.name}": value[slice(*piece.write_range)]
        for piece in chunks
        if piece.write_range[0] < piece.write_range[1]
        for part, value in piece.tensors.items()
    }
    order = sorted(runs, key=lambda key: -runs[key].element_size())  # so that every run is aligned to its elements
    shapes = json.dumps({piece.name: piece.shape for piece in chunks})
    header: dict[str, Any] = {"__metadata__": {"shapes": shapes}}
    end = 0
    for key in order:
        begin, end = end, end + runs[key].nbytes
        header[key] = {"dtype": _DTYPES[runs[key].dtype], "shape": [len(runs[key])], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (folder / chunk_file_name(rank)).open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 8 + len(text) + end)
        for chunk in (len(text).to_bytes(8, "little"), text, *(_tensor_bytes(runs[key]) for key in order)):
            stream.write(chunk)
            digest.update(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def load_chunks(folder: Path, chunks: Sequence[TensorChunk]) -> None:
    """Fill pieces from whatever pieces a folder holds; nothing is changed unless everything fits.

    Raises: CheckpointError that names the tensor which is missing, left over, incomplete or of another shape or type.
    """
    index = _ChunkIndex.from_folder(folder)
    index.check(chunks)
    ranges: dict[Path, list[tuple[str, slice, Tensor]]] = {}
    for piece in chunks:
        for part, value in piece.tensors.items():
            for run in index.stored.get((part, piece.name), []):
                begin, end = max(piece.start, run.start), min(piece.start + len(value), run.stop)
                if begin < end:
                    there, here = (
                        slice(begin - run.start, end - run.start),
                        slice(begin - piece.start, end - piece.start),
                    )
                    ranges.setdefault(run.file, []).append((f"{part} {run.start} {piece.name}", there, value[here]))
    for file, wanted in ranges.items():
        with _open_safetensors(file) as handle:
            for key, there, value in wanted:
                value.copy_(handle.get_slice(key)[there])


@dataclass(frozen=True, slots=True)
class _StoredChunk:
    start: int
    stop: int
    dtype: str
    file: Path


@dataclass(frozen=True, slots=True)
class _ChunkIndex:
    """What the files of a folder hold, from their headers alone."""

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
                for key in handle.keys():  # noqa: SIM118 - it is no dict
                    part, start, name = key.split(" ", 2)
                    run = handle.get_slice(key)
                    found = _StoredChunk(int(start), int(start) + run.get_shape()[0], run.get_dtype(), file)
                    index.stored.setdefault((part, name), []).append(found)
        for runs in index.stored.values():
            runs.sort(key=lambda run: run.start)
        return index

    def check(self, chunks: Sequence[TensorChunk]) -> None:
        """Whether these pieces, and nothing else, can be filled from it. Raises: CheckpointError."""
        wanted = {piece.name: piece for piece in chunks}
        for name in [*wanted, *sorted(self.shapes.keys() - wanted.keys())]:
            if name not in wanted or name not in self.shapes:
                lacks = "has {}, which the model has not" if name not in wanted else "lacks {}, which the model has"
                raise CheckpointError(
                    f"{self.folder} {lacks.format(name)}; go on with the model that it was saved from, or start anew with "
                    f"another run.dir"
                )
            self._check_chunk(wanted[name])

    def _check_chunk(self, chunk: TensorChunk) -> None:
        name, shape = chunk.name, self.shapes[chunk.name]
        if shape != chunk.shape:
            raise CheckpointError(
                f"{self.folder} has {name} in shape {list(shape)}, the model in {list(chunk.shape)}; go on with the model "
                f"that it was saved from"
            )
        size = math.prod(shape)
        parts = {part for part, each in self.stored if each == name} if size else chunk.tensors.keys()
        if parts != chunk.tensors.keys():
            was, now = ("trained" if len(each) > 1 else "frozen" for each in (parts, chunk.tensors))
            raise CheckpointError(f"{name} was {was} when {self.folder} was saved and is {now} now; set it back")
        for part, value in chunk.tensors.items():
            runs = self.stored.get((part, name), [])
            end = 0
            for run in [*runs, _StoredChunk(size, size, "", self.folder)]:
                if run.start != end:
                    fault = (
                        f"lacks elements {end} to {run.start - 1}"
                        if run.start > end
                        else f"has element {run.start} twice"
                    )
                    raise CheckpointError(
                        f"{self.folder} is not whole: it {fault} of {name} ({part}, {size} elements); remove it to go on "
                        f"from the one before"
                    )
                end = run.stop
            for run in runs:
                if run.dtype != _DTYPES[value.dtype]:
                    raise CheckpointError(
                        f"{run.file} has {name} ({part}) as {run.dtype}, the model as {_DTYPES[value.dtype]}; go on with the "
                        f"model that it was saved from"
                    )


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as handle:
            yield handle
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); remove its folder to go on from the one before"
        ) from None
    except OSError as error:
        raise StorageUnreachableError(f"{file} cannot be read ({error})") from None


def _tensor_bytes(run: Tensor) -> memoryview:
    """A run's bytes, without a copy where it lies on the CPU."""
    return run.cpu().view(torch.uint8).numpy().data
