"""The index of a checkpoint's chunks: which rank's file has which range of which tensor, and the reading of them.

A save writes the index as ``index.json`` beside the ranks' files. Rank 0 reads it and gives it to all ranks: otherwise
each rank would read the header of each file, a million headers for a thousand ranks. Checkpoints of 0.1 have no
``index.json``; rank 0 reads their headers.
"""

import bisect
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from foveal.atomic import read_json
from foveal.checkpoint.chunks import DTYPE_NAMES, TensorChunk, chunk_file_name, replicated_chunk
from foveal.errors import CheckpointError, StorageUnreachableError

INDEX_NAME = "index.json"


@dataclass(frozen=True, slots=True)
class StoredRanges:
    """The ranges of a tensor that the ranks' files have: number of the rank, first element and end, by ascending start.

    Arrays and not objects, because a thousand ranks under ZeRO 3 write a range of each of hundreds of tensors.
    """

    ranks: "array[int]"
    starts: "array[int]"
    stops: "array[int]"

    @classmethod
    def sort(cls, ranges: Sequence[tuple[int, int, int]]) -> "StoredRanges":
        """Return the ranges of (start, stop, rank) triples."""
        starts, stops, ranks = zip(*sorted(ranges), strict=True) if ranges else ((), (), ())
        return cls(array("q", ranks), array("q", starts), array("q", stops))

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield rank, start and stop of the ranges with an element in [start, stop); the ranges have no holes."""
        for number in range(bisect.bisect_right(self.stops, start), bisect.bisect_left(self.starts, stop)):
            yield self.ranks[number], self.starts[number], self.stops[number]


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """The tensors of a checkpoint. ``stored`` and ``dtypes`` are by (part, name); a tensor without elements has neither."""

    folder: Path
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[tuple[str, str], str] = field(default_factory=dict)
    stored: dict[tuple[str, str], StoredRanges] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "ChunkIndex":
        """Read the index of a checkpoint, or the headers of its files if a version without an index wrote it.

        Raises: CheckpointError, StorageUnreachableError.
        """
        try:
            tensors = read_json(folder / INDEX_NAME)["tensors"]
        except FileNotFoundError:
            return cls._from_headers(folder)
        except OSError as error:
            raise StorageUnreachableError(f"{folder / INDEX_NAME} cannot be read ({error})") from None
        index = cls(folder)
        for name, entry in tensors.items():
            index.shapes[name] = tuple(entry["shape"])
            ranges = StoredRanges(*(array("q", entry[key]) for key in ("ranks", "starts", "stops")))
            if ranges.starts:
                index.dtypes.update({(part, name): dtype for part, dtype in entry["parts"].items()})
                index.stored.update(dict.fromkeys(((part, name) for part in entry["parts"]), ranges))
        return index

    @classmethod
    def _from_headers(cls, folder: Path) -> "ChunkIndex":
        index = cls(folder)
        ranges: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        for file in sorted(folder.glob("pieces-*.safetensors")):
            rank = int(file.stem.removeprefix("pieces-"))
            with _open_safetensors(file) as handle:
                index.shapes.update(
                    (name, tuple(shape)) for name, shape in json.loads(handle.metadata()["shapes"]).items()
                )
                for key in handle.keys():  # noqa: SIM118 - the handle is not iterable
                    part, start, name = key.split(" ", 2)
                    values = handle.get_slice(key)
                    stop = int(start) + values.get_shape()[0]
                    ranges.setdefault((part, name), []).append((int(start), stop, rank))
                    index.dtypes[part, name] = values.get_dtype()
        index.stored.update((key, StoredRanges.sort(values)) for key, values in ranges.items())
        return index

    def weights_only(self) -> "ChunkIndex":
        """Return the index without moments."""
        return replace(self, stored={key: ranges for key, ranges in self.stored.items() if key[0] == "weight"})

    def parts_by_name(self) -> dict[str, set[str]]:
        """Return the parts ("weight", moments) of every tensor with elements, by its name."""
        parts: dict[str, set[str]] = {}
        for part, name in self.stored:
            parts.setdefault(name, set()).add(part)
        return parts

    def check(self, chunks: Sequence[TensorChunk]) -> None:
        """Check that the checkpoint holds exactly these chunks' tensors. Raises: CheckpointError."""
        by_name, parts = {chunk.name: chunk for chunk in chunks}, self.parts_by_name()
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
            self._check_chunk(by_name[name], parts.get(name, set()))

    def _check_chunk(self, chunk: TensorChunk, stored_parts: set[str]) -> None:
        name, shape = chunk.name, self.shapes[chunk.name]
        if shape != chunk.shape:
            raise CheckpointError(
                f"{self.folder} has {name} in shape {list(shape)}, the model in {list(chunk.shape)}; continue with the "
                f"model that it was saved from"
            )
        size = math.prod(shape)
        parts = stored_parts if size else chunk.flat_views_by_part.keys()
        if parts != chunk.flat_views_by_part.keys():
            before = "trained" if len(parts) > 1 else "frozen"
            now = "trained" if len(chunk.flat_views_by_part) > 1 else "frozen"
            raise CheckpointError(f"{name} was {before} when {self.folder} was saved and is {now} now; set it back")
        for part, value in chunk.flat_views_by_part.items():
            if not size:
                continue
            self._check_complete(self.stored[part, name], size, f"{name} ({part}, {size} elements)")
            if self.dtypes[part, name] != DTYPE_NAMES[value.dtype]:
                raise CheckpointError(
                    f"{self.folder} has {name} ({part}) as {self.dtypes[part, name]}, the model as "
                    f"{DTYPE_NAMES[value.dtype]}; continue with the model that it was saved from"
                )

    def _check_complete(self, ranges: StoredRanges, size: int, tensor: str) -> None:
        starts, ends = [*ranges.starts, size], [0, *ranges.stops]
        if starts == ends:
            return
        for start, end in zip(starts, ends, strict=True):
            if start != end:
                fault = f"lacks elements {end} to {start - 1}" if start > end else f"has element {start} twice"
                raise CheckpointError(
                    f"{self.folder} is incomplete: it {fault} of {tensor}; remove it to continue from the checkpoint "
                    f"before"
                )


def encode_index(chunks: Sequence[TensorChunk], write_ranges_by_rank: Sequence[bytes]) -> bytes:
    """Return the content of ``index.json``: a rank's chunks, and what every rank wrote (``pack_write_ranges``)."""
    tensors = {}
    ranges_by_rank = [array("q", packed) for packed in write_ranges_by_rank]
    for number, chunk in enumerate(sorted(chunks, key=lambda chunk: chunk.name)):
        bounds = [(ranges[2 * number], ranges[2 * number + 1], rank) for rank, ranges in enumerate(ranges_by_rank)]
        ranges = StoredRanges.sort([(start, stop, rank) for start, stop, rank in bounds if start < stop])
        tensors[chunk.name] = {
            "shape": chunk.shape,
            "parts": {part: DTYPE_NAMES[value.dtype] for part, value in chunk.flat_views_by_part.items()},
            "ranks": ranges.ranks.tolist(),
            "starts": ranges.starts.tolist(),
            "stops": ranges.stops.tolist(),
        }
    return json.dumps({"tensors": tensors}, separators=(",", ":")).encode()


def load_chunks(
    folder: Path,
    target_chunks: Sequence[TensorChunk],
    index: ChunkIndex | None = None,
    *,
    weights_only: bool = False,
) -> None:
    """Fill chunks from a folder, however its files divide the tensors; changes nothing unless all chunks fit.

    ``index``: the folder's, if it has been read. ``weights_only``: leave the moments as they are, whatever moments the
    folder has.
    Raises: CheckpointError that names a tensor which is missing, surplus, incomplete, or of another shape or dtype.
    """
    index = index or ChunkIndex.read(folder)
    if weights_only:
        index = index.weights_only()
        target_chunks = [
            replace(chunk, flat_views_by_part={"weight": chunk.flat_views_by_part["weight"]}) for chunk in target_chunks
        ]
    index.check(target_chunks)
    reads: dict[int, list[tuple[str, slice, Tensor]]] = {}
    for chunk in target_chunks:
        for part, value in chunk.flat_views_by_part.items():
            stop = chunk.flat_start + len(value)
            if not len(value):
                continue
            for rank, stored_start, stored_stop in index.stored[part, chunk.name].overlapping(chunk.flat_start, stop):
                begin, end = max(chunk.flat_start, stored_start), min(stop, stored_stop)
                source = slice(begin - stored_start, end - stored_start)
                target = value[begin - chunk.flat_start : end - chunk.flat_start]
                reads.setdefault(rank, []).append((f"{part} {stored_start} {chunk.name}", source, target))
    for rank, file_reads in reads.items():
        with _open_safetensors(folder / chunk_file_name(rank)) as handle:
            for key, source, target in file_reads:
                target.copy_(handle.get_slice(key)[source])


def check_weights_fit(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that a folder has the weights of exactly these tensors, which may be on the meta device.

    Raises: CheckpointError as ``load_chunks``.
    """
    chunks = [replicated_chunk(name, {"weight": value}, 0, 1) for name, value in tensors.items()]
    ChunkIndex.read(folder).weights_only().check(chunks)


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
