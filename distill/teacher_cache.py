"""Teacher outputs on disk, for reuse by other students and other attempts.

A file has a row of fixed size for every view of an image in a run. All ranks, and other runs, write concurrently and
may be killed at any moment: a row is valid only if its checksum over file key, row number and content matches. Invalid
rows are computed again. The file has holes where no row was written.
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
_ROW_MAGIC = b"kept"  # a hole reads as zeros and is never a valid row
_TRAILER_BYTES = len(_ROW_MAGIC) + 4
_log = logging.getLogger("foveal.distill")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a row: shape without the batch dimension, and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_row(self) -> int:
        """Size in a row, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TeacherCache:
    """The rows of one file. A full or failing disk stops the caching with a warning, never the run."""

    def __init__(
        self, folder: Path, key_fields: Mapping[str, Any], num_rows: int, tensor_specs: Sequence[TensorSpec]
    ) -> None:
        """``key_fields`` are everything the outputs depend on, as plain data: they and the specs select the file.

        Raises: ConfigError if the folder cannot be used, or has a file of the same name with other key fields.
        """
        self.num_rows, self.tensor_specs = num_rows, tuple(tensor_specs)
        key = {
            "format": FORMAT,
            "row": [[list(spec.shape), str(spec.dtype)] for spec in tensor_specs],
            "facts": dict(key_fields),
        }
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).digest()
        self._row_bytes = sum(spec.bytes_per_row for spec in tensor_specs)
        self._fd, self._writable = -1, True
        path = folder / self._key.hex()[:16]
        file_bytes = num_rows * (self._row_bytes + _TRAILER_BYTES)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write_or_check_key_fields(path / "facts.json", key)
            self._fd = os.open(path / "rows", os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self._fd).st_size < file_bytes:  # never shorten the file of a longer run
                os.ftruncate(self._fd, file_bytes)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise ConfigError(f"{path} cannot be used as the teacher cache ({error})") from None
            self._stop_writing(error)

    def get(self, row_numbers: Tensor) -> tuple[Tensor, ...] | None:
        """Return the tensors of these rows [B], each [B, *shape] on the CPU; None unless every row is valid."""
        if self._fd == -1:
            return None
        content = torch.empty(len(row_numbers), self._row_bytes + _TRAILER_BYTES, dtype=torch.uint8)
        for row, buffer in zip(row_numbers.tolist(), content, strict=True):
            if not self._read_row(row, buffer.numpy().data):
                return None
        return self._unpack_rows(content)

    def put(self, row_numbers: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the tensors, each [B, *shape], as these rows [B]; a disk error stops the caching, not the run."""
        if not self._writable:
            return
        content = self._pack_rows(len(row_numbers), tensors)
        try:
            for row, row_content in zip(row_numbers.tolist(), content, strict=True):
                self._write_row(row, row_content.numpy().tobytes())
        except OSError as error:
            self._stop_writing(error)

    def get_or_compute(self, row_numbers: Tensor, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the tensors of these rows: cached, on the CPU, or else computed and then written."""
        tensors = self.get(row_numbers)
        if tensors is None:
            tensors = compute()
            self.put(row_numbers, tensors)
        return tensors

    def close(self) -> None:
        """Close the file; later reads miss and later writes do nothing."""
        if self._fd != -1:
            os.close(self._fd)
        self._fd, self._writable = -1, False

    def _read_row(self, row: int, buffer: memoryview) -> bool:
        """Read a row and its trailer into the buffer; return whether the row is valid."""
        try:
            read = os.preadv(self._fd, [buffer], self._row_offset(row))
        except OSError as error:
            self._stop_writing(error)
            self.close()
            return False
        return read == len(buffer) and buffer[self._row_bytes :] == self._row_trailer(row, buffer[: self._row_bytes])

    def _write_row(self, row: int, content: bytes) -> None:
        """Write a row and its trailer. Raises: OSError."""
        remaining = memoryview(content + self._row_trailer(row, content))
        offset = self._row_offset(row)
        while remaining:
            written = os.pwrite(self._fd, remaining, offset)
            remaining, offset = remaining[written:], offset + written

    def _row_offset(self, row: int) -> int:
        assert 0 <= row < self.num_rows, f"row {row} of {self.num_rows}"
        return row * (self._row_bytes + _TRAILER_BYTES)

    def _row_trailer(self, row: int, content: bytes | memoryview) -> bytes:
        """Return magic and checksum over file key, row number and content."""
        return _ROW_MAGIC + zlib.crc32(content, zlib.crc32(self._key + row.to_bytes(8, "little"))).to_bytes(4, "little")

    def _pack_rows(self, count: int, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensors as bytes, uint8 [B, row bytes]."""
        columns = []
        for spec, tensor in zip(self.tensor_specs, tensors, strict=True):
            shape, dtype = tuple(tensor.shape), tensor.dtype
            assert (shape, dtype) == ((count, *spec.shape), spec.dtype), f"{shape}, {dtype} for {count} of {spec}"
            columns.append(tensor.detach().cpu().contiguous().view(count, -1).view(torch.uint8))
        return torch.cat(columns, dim=1)

    def _unpack_rows(self, content: Tensor) -> tuple[Tensor, ...]:
        columns = content[:, : self._row_bytes].split([spec.bytes_per_row for spec in self.tensor_specs], dim=1)
        copies = [column.clone(memory_format=torch.contiguous_format).view(-1) for column in columns]
        return tuple(
            copy.view(spec.dtype).view(len(content), *spec.shape)
            for spec, copy in zip(self.tensor_specs, copies, strict=True)
        )

    def _stop_writing(self, error: OSError) -> None:
        _log.warning("teacher cache disabled (%s): the teacher runs at every step from now on", error)
        self._writable = False


def check_cache_size(
    num_rows: int, tensor_specs: Sequence[TensorSpec], max_gigabytes: float, setting_name: str
) -> None:
    """Raise: ConfigError if the rows take more than ``max_gigabytes`` (10^9 bytes), the value of ``setting_name``."""
    row_bytes = sum(spec.bytes_per_row for spec in tensor_specs) + _TRAILER_BYTES
    if num_rows * row_bytes > max_gigabytes * 1e9:
        raise ConfigError(
            f"{setting_name}={max_gigabytes:g}, but the teacher's outputs for {num_rows:,} views of images take up to "
            f"{format_bytes(num_rows * row_bytes)} ({format_bytes(row_bytes)} each): raise the limit, or disable the "
            f"cache"
        )


def _write_or_check_key_fields(file: Path, expected: dict[str, Any]) -> None:
    """Write the key fields next to the rows, or check those there. Raises: ConfigError if they differ."""
    try:
        fields = json.loads(file.read_text())
    except FileNotFoundError:
        # Ranks in containers may share a PID, and so the temporary file's name: another rank was first.
        with contextlib.suppress(FileNotFoundError):
            write_json(file, expected)
        return
    except ValueError:
        fields = None
    if fields != json.loads(json.dumps(expected)):
        raise ConfigError(f"{file} belongs to another teacher, other images or other settings: remove {file.parent}")
