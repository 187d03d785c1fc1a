"""The checkpoint format of every engine, world size and ZeRO stage: ranges of elements under the module's names.

Each rank writes a safetensors file of its ranges; ``chunk_index`` finds and reads the ranges of all files. No pickle is
written or read.
"""

import hashlib
import json
import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.atomic import reserve_space

_MAX_REPLICA_WRITERS = 16  # ranks that write a tensor that all ranks hold: every rank reads all their files at a resume
DTYPE_NAMES = {
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
    """Return the chunk of a tensor that every rank holds in full; each of at most 16 ranks writes an equal part.

    The writers are the first ranks of equal groups of ranks, so that they are on different nodes.
    """
    shape = tuple(tensors_by_part["weight"].shape)
    size = math.prod(shape)
    flat = {part: value.detach().view(-1) for part, value in tensors_by_part.items()}
    writers = count_replica_writers(world_size)
    first, last = (-(-number * writers // world_size) for number in (rank, rank + 1))
    return TensorChunk(name, shape, 0, flat, (size * first // writers, size * last // writers))


def count_replica_writers(world_size: int) -> int:
    """Return the number of ranks that write a tensor that all ranks hold."""
    return min(world_size, _MAX_REPLICA_WRITERS)


def chunk_file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"pieces-{rank:05d}.safetensors"


def write_and_hash_chunks(folder: Path, rank: int, chunks: Sequence[TensorChunk]) -> str:
    """Write this rank's part of the chunks to its file and fsync; return the sha256 of the file's bytes, in hex.

    foveal writes the safetensors file itself to reserve its space before the first byte (``reserve_space``: a full disk
    or an exceeded quota fails at once) and to digest the bytes in memory, not those on disk. Raises: OSError.
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
        header[key] = {"dtype": DTYPE_NAMES[values.dtype], "shape": [len(values)], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (folder / chunk_file_name(rank)).open("wb") as stream:
        reserve_space(stream.fileno(), 8 + len(text) + end)
        for content in (len(text).to_bytes(8, "little"), text, *(_tensor_bytes(ranges[key]) for key in order)):
            stream.write(content)
            digest.update(content)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def pack_write_ranges(chunks: Sequence[TensorChunk]) -> bytes:
    """Return the first element and the end of the range that this rank writes of each tensor, in the order of names.

    16 bytes a tensor: every rank sends them to every other one at each save, thousands of ranks and tensors included.
    """
    ranges = array("q")
    for chunk in sorted(chunks, key=lambda chunk: chunk.name):
        ranges.extend(chunk.flat_start + end for end in chunk.relative_write_range)
    return ranges.tobytes()


def count_bytes_to_write(chunks: Sequence[TensorChunk]) -> int:
    """Return the number of bytes that this rank writes of its chunks."""
    return sum(
        value.element_size() * (chunk.relative_write_range[1] - chunk.relative_write_range[0])
        for chunk in chunks
        for value in chunk.flat_views_by_part.values()
    )


def count_bytes_of_all_ranks(chunks: Sequence[TensorChunk]) -> int:
    """Return the number of bytes that all ranks write together, from the chunks of any rank."""
    return sum(
        math.prod(chunk.shape) * sum(value.element_size() for value in chunk.flat_views_by_part.values())
        for chunk in chunks
    )


def _tensor_bytes(values: Tensor) -> memoryview:
    """Return a tensor's bytes, without a copy if the tensor is on the CPU."""
    return values.cpu().view(torch.uint8).numpy().data
