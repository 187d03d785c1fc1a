"""A teacher's answers, kept on disk: what another student, or another attempt, would have to ask again.

A file has a row of fixed size for every view of an image that a run can see. All ranks, and other runs, write into it at
once and may be killed at any moment: a row is believed only if its checksum, which knows the file and the row, is right,
and what is not believed is asked again. The file has holes where no row was written.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.atomic import DISK_FULL_ERRNOS, format_bytes, write_json
from foveal.errors import ConfigError

FORMAT = 1
_ROW_MAGIC = b"kept"  # so that a hole, which reads as zeros, is never a row
_TRAILER_BYTES = len(_ROW_MAGIC) + 4
_log = logging.getLogger("foveal.distill")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a row: its shape, without the dimension of the batch, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """What it takes in a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class TeacherCache:
    """The rows of one file. A disk that is full, or fails, ends the keeping with a warning, never the run."""

    def __init__(
        self, folder: Path, key_fields: Mapping[str, Any], num_rows: int, tensor_specs: Sequence[TensorSpec]
    ) -> None:
        """``facts`` are all that the answers depend on, as plain data: other facts, or other parts, are another file.

        Raises: ConfigError where the folder cannot be used, or holds a file of the same name and other facts.
        """
        self.num_rows, self.tensor_specs = num_rows, tuple(tensor_specs)
        told = {
            "format": FORMAT,
            "row": [[list(part.shape), str(part.dtype)] for part in tensor_specs],
            "facts": dict(key_fields),
        }
        self._key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
        self._row_bytes = sum(part.num_bytes for part in tensor_specs)
        self._fd, self._writable = -1, True
        place = folder / self._key.hex()[:16]
        try:
            place.mkdir(parents=True, exist_ok=True)
            _write_or_check_key_fields(place / "facts.json", told)
            self._fd = os.open(place / "rows", os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._fd).st_size < num_rows * (
                self._row_bytes + _TRAILER_BYTES
            ):  # a longer run's rows are kept
                os.ftruncate(self._fd, num_rows * (self._row_bytes + _TRAILER_BYTES))
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise ConfigError(f"{place} cannot keep the teacher's answers ({error})") from None
            self._stop_writing(error)

    def get(self, indices: Tensor) -> tuple[Tensor, ...] | None:
        """The parts of these rows [B], each [B, *shape] on the CPU; nothing unless every row is there and whole."""
        if self._fd == -1:
            return None
        content = torch.empty(len(indices), self._row_bytes + _TRAILER_BYTES, dtype=torch.uint8)
        for row, into in zip(indices.tolist(), content, strict=True):
            if not self._read_row(row, into.numpy().data):
                return None
        return self._unpack_rows(content)

    def put(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        """Keep the parts, each [B, *shape], as these rows [B]; a full disk ends the keeping, not the run."""
        if not self._writable:
            return
        content = self._pack_rows(len(indices), tensors)
        try:
            for row, each in zip(indices.tolist(), content, strict=True):
                self._write_row(row, each.numpy().tobytes())
        except OSError as error:
            self._stop_writing(error)

    def get_or_compute(self, indices: Tensor, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The parts of these rows: those that are kept, on the CPU, or else what ``ask`` answers, which is kept then."""
        found = self.get(indices)
        if found is None:
            found = compute()
            self.put(indices, found)
        return found

    def close(self) -> None:
        """Nothing is read or written any more."""
        if self._fd != -1:
            os.close(self._fd)
        self._fd, self._writable = -1, False

    def _read_row(self, row: int, buffer: memoryview) -> bool:
        """Whether a row is there and whole; then ``into`` holds it."""
        try:
            read = os.preadv(self._fd, [buffer], self._row_offset(row))
        except OSError as error:
            self._stop_writing(error)
            self.close()
            return False
        return read == len(buffer) and buffer[self._row_bytes :] == self._row_trailer(row, buffer[: self._row_bytes])

    def _write_row(self, row: int, content: bytes) -> None:
        """A row and its seal, at its place. Raises: OSError."""
        rest = memoryview(content + self._row_trailer(row, content))
        place = self._row_offset(row)
        while rest:
            written = os.pwrite(self._fd, rest, place)
            rest, place = rest[written:], place + written

    def _row_offset(self, row: int) -> int:
        assert 0 <= row < self.num_rows, f"row {row} of {self.num_rows}"
        return row * (self._row_bytes + _TRAILER_BYTES)

    def _row_trailer(self, row: int, content: bytes | memoryview) -> bytes:
        """What says that a row's content is this row's, of this file, and whole."""
        return _ROW_MAGIC + zlib.crc32(content, zlib.crc32(self._key + row.to_bytes(8, "little"))).to_bytes(4, "little")

    def _pack_rows(self, count: int, tensors: Sequence[Tensor]) -> Tensor:
        """The parts as bytes, uint8 [B, size]."""
        bytes_of = []
        for part, tensor in zip(self.tensor_specs, tensors, strict=True):
            found = (tuple(tensor.shape), tensor.dtype)
            assert found == ((count, *part.shape), part.dtype), f"{found} for {count} of {part}"
            bytes_of.append(tensor.detach().cpu().contiguous().view(count, -1).view(torch.uint8))
        return torch.cat(bytes_of, dim=1)

    def _unpack_rows(self, content: Tensor) -> tuple[Tensor, ...]:
        columns = content[:, : self._row_bytes].split([part.num_bytes for part in self.tensor_specs], dim=1)
        copies = [column.clone(memory_format=torch.contiguous_format).view(-1) for column in columns]
        return tuple(
            copy.view(part.dtype).view(len(content), *part.shape)
            for part, copy in zip(self.tensor_specs, copies, strict=True)
        )

    def _stop_writing(self, error: OSError) -> None:
        _log.warning("the teacher's answers are kept no longer (%s): from here on it is asked", error)
        self._writable = False


def check_cache_size(
    num_rows: int, tensor_specs: Sequence[TensorSpec], max_gigabytes: float, setting_name: str
) -> None:
    """Refuse what could take more than ``gigabytes`` (10^9 bytes), which ``setting`` says. Raises: ConfigError."""
    row = sum(part.num_bytes for part in tensor_specs) + _TRAILER_BYTES
    if num_rows * row > max_gigabytes * 1e9:
        raise ConfigError(
            f"{setting_name}={max_gigabytes:g}, but the teacher's answers on {num_rows:,} views of images take up to "
            f"{format_bytes(num_rows * row)} ({format_bytes(row)} each): allow as much, or keep none"
        )


def _write_or_check_key_fields(file: Path, expected: dict[str, Any]) -> None:
    """Write the facts down beside the rows, or see that they are the same. Raises: ConfigError."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        # Ranks in containers may have the same process number, and so the same draft: one of them was first.
        with contextlib.suppress(FileNotFoundError):
            write_json(file, expected)
        return
    except ValueError:
        found = None
    if found != json.loads(json.dumps(expected)):
        raise ConfigError(f"{file} is not of this teacher, these images and these settings: remove {file.parent}")
