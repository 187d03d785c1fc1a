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

from foveal.atomic import FULL, in_gigabytes, write_json
from foveal.errors import ConfigError

FORMAT = 1
_MARK = b"kept"  # so that a hole, which reads as zeros, is never a row
_SEAL = len(_MARK) + 4
_log = logging.getLogger("foveal.distill")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a row: its shape, without the dimension of the batch, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes in a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Lessons:
    """The rows of one file. A disk that is full, or fails, ends the keeping with a warning, never the run."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], rows: int, parts: Sequence[Part]) -> None:
        """``facts`` are all that the answers depend on, as plain data: other facts, or other parts, are another file.

        Errors: ConfigError where the folder cannot be used, or holds a file of the same name and other facts.
        """
        self.rows, self.parts = rows, tuple(parts)
        told = {"format": FORMAT, "row": [[list(part.shape), str(part.dtype)] for part in parts], "facts": dict(facts)}
        self._key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()
        self._size = sum(part.bytes for part in parts)
        self._file, self._writes = -1, True
        place = folder / self._key.hex()[:16]
        try:
            place.mkdir(parents=True, exist_ok=True)
            _agree(place / "facts.json", told)
            self._file = os.open(place / "rows", os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._file).st_size < rows * (self._size + _SEAL):  # a longer run's rows are kept
                os.ftruncate(self._file, rows * (self._size + _SEAL))
        except OSError as error:
            if error.errno not in FULL:
                raise ConfigError(f"{place} cannot keep the teacher's answers ({error})") from None
            self._give_up(error)

    def get(self, indices: Tensor) -> tuple[Tensor, ...] | None:
        """The parts of these rows [B], each [B, *shape] on the CPU; nothing unless every row is there and whole."""
        if self._file == -1:
            return None
        content = torch.empty(len(indices), self._size + _SEAL, dtype=torch.uint8)
        for row, into in zip(indices.tolist(), content, strict=True):
            if not self._read(row, into.numpy().data):
                return None
        return self._split(content)

    def put(self, indices: Tensor, tensors: Sequence[Tensor]) -> None:
        """Keep the parts, each [B, *shape], as these rows [B]; a full disk ends the keeping, not the run."""
        if not self._writes:
            return
        content = self._joined(len(indices), tensors)
        try:
            for row, each in zip(indices.tolist(), content, strict=True):
                self._write(row, each.numpy().tobytes())
        except OSError as error:
            self._give_up(error)

    def asked(self, indices: Tensor, ask: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The parts of these rows: those that are kept, on the CPU, or else what ``ask`` answers, which is kept then."""
        found = self.get(indices)
        if found is None:
            found = ask()
            self.put(indices, found)
        return found

    def close(self) -> None:
        """Nothing is read or written any more."""
        if self._file != -1:
            os.close(self._file)
        self._file, self._writes = -1, False

    def _read(self, row: int, into: memoryview) -> bool:
        """Whether a row is there and whole; then ``into`` holds it."""
        try:
            read = os.preadv(self._file, [into], self._place(row))
        except OSError as error:
            self._give_up(error)
            self.close()
            return False
        return read == len(into) and into[self._size :] == self._seal(row, into[: self._size])

    def _write(self, row: int, content: bytes) -> None:
        """A row and its seal, at its place. Errors: OSError."""
        rest = memoryview(content + self._seal(row, content))
        place = self._place(row)
        while rest:
            written = os.pwrite(self._file, rest, place)
            rest, place = rest[written:], place + written

    def _place(self, row: int) -> int:
        assert 0 <= row < self.rows, f"row {row} of {self.rows}"
        return row * (self._size + _SEAL)

    def _seal(self, row: int, content: bytes | memoryview) -> bytes:
        """What says that a row's content is this row's, of this file, and whole."""
        return _MARK + zlib.crc32(content, zlib.crc32(self._key + row.to_bytes(8, "little"))).to_bytes(4, "little")

    def _joined(self, count: int, tensors: Sequence[Tensor]) -> Tensor:
        """The parts as bytes, uint8 [B, size]."""
        bytes_of = []
        for part, tensor in zip(self.parts, tensors, strict=True):
            found = (tuple(tensor.shape), tensor.dtype)
            assert found == ((count, *part.shape), part.dtype), f"{found} for {count} of {part}"
            bytes_of.append(tensor.detach().cpu().contiguous().view(count, -1).view(torch.uint8))
        return torch.cat(bytes_of, dim=1)

    def _split(self, content: Tensor) -> tuple[Tensor, ...]:
        columns = content[:, : self._size].split([part.bytes for part in self.parts], dim=1)
        copies = [column.clone(memory_format=torch.contiguous_format).view(-1) for column in columns]
        return tuple(
            copy.view(part.dtype).view(len(content), *part.shape) for part, copy in zip(self.parts, copies, strict=True)
        )

    def _give_up(self, error: OSError) -> None:
        _log.warning("the teacher's answers are kept no longer (%s): from here on it is asked", error)
        self._writes = False


def check_bound(rows: int, parts: Sequence[Part], gigabytes: float, setting: str) -> None:
    """Refuse what could take more than ``gigabytes`` (10^9 bytes), which ``setting`` says. Errors: ConfigError."""
    row = sum(part.bytes for part in parts) + _SEAL
    if rows * row > gigabytes * 1e9:
        raise ConfigError(
            f"{setting}={gigabytes:g}, but the teacher's answers on {rows:,} views of images take up to "
            f"{in_gigabytes(rows * row)} ({in_gigabytes(row)} each): allow as much, or keep none"
        )


def _agree(file: Path, told: dict[str, Any]) -> None:
    """Write the facts down beside the rows, or see that they are the same. Errors: ConfigError."""
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        # Ranks in containers may have the same process number, and so the same draft: one of them was first.
        with contextlib.suppress(FileNotFoundError):
            write_json(file, told)
        return
    except ValueError:
        found = None
    if found != json.loads(json.dumps(told)):
        raise ConfigError(f"{file} is not of this teacher, these images and these settings: remove {file.parent}")
