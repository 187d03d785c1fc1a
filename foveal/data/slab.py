"""Memory that worker processes write microbatches into and the trainer trains from, without a copy between them.

It is a file in memory without a name: whatever process is killed, nothing of it stays.
"""

import mmap
import os
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.data.batch import release_finished_copies
from foveal.data.memory_file import allocate_memory_file
from foveal.data.row_arrays import RowLayout
from foveal.errors import OutOfMemoryError

_PAGE = mmap.PAGESIZE
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context of the process
_REMEDY = "lower data.prefetch_batches or batch.max_micro_size"
_COPIED = ("labels", "ids", "sample_keys", "valid")  # some bytes per row, which a consumer may keep


class SlabMap:
    """A process's view of a slab: slots of one layout each, behind a page whose first number is the slab's user."""

    def __init__(self, descriptor: int, layout: RowLayout, num_slots: int) -> None:
        self._offsets, self._slot_bytes = _place_tensors(layout)
        self.num_bytes = count_slab_bytes(layout, num_slots)
        self.memory = mmap.mmap(descriptor, self.num_bytes)
        self._user = np.ndarray((1,), np.int64, self.memory)
        self._layout = layout

    @property
    def user(self) -> int:
        """Number of the stream whose microbatches are wanted; 0: none."""
        return int(self._user[0])

    @user.setter
    def user(self, stream: int) -> None:
        self._user[0] = stream

    def arrays(self, slot: int) -> dict[str, np.ndarray]:
        """Return the arrays of a slot, by name."""
        start = _PAGE + slot * self._slot_bytes
        return {
            name: np.ndarray(shape, dtype, self.memory, start + self._offsets[name])
            for name, shape, dtype in self._layout.shapes
        }


class Slab:
    """A slab as the trainer holds it: allocates slots, page-locked where there is a GPU, and knows which are in use."""

    def __init__(self, layout: RowLayout, num_slots: int) -> None:
        self.layout, self.num_slots = layout, num_slots
        self.descriptor = allocate_memory_file(
            "foveal-batches", count_slab_bytes(layout, num_slots), f"{num_slots} microbatches", _REMEDY
        )
        self.map = SlabMap(self.descriptor, layout, num_slots)
        self.num_unfinished = 0  # jobs of workers that may still write
        self._free = deque(range(num_slots))
        self._reserved: set[int] = set()
        self._is_page_locked = torch.cuda.is_available()
        if self._is_page_locked:
            _page_lock(self.map)

    @property
    def num_free(self) -> int:
        """Number of slots that nothing uses."""
        return len(self._free)

    def take_slot(self) -> int:
        """Reserve a slot that nothing uses, for a microbatch; there must be one."""
        slot = self._free.popleft()
        self._reserved.add(slot)
        return slot

    def free_reserved_slots(self) -> None:
        """Give back the slots of microbatches that nobody wants any more."""
        self._free.extend(self._reserved)
        self._reserved.clear()

    def lend_slot(self, slot: int) -> dict[str, Tensor]:
        """Return the tensors of a slot, which is free when the last of them and of their views is gone."""
        self._reserved.remove(slot)
        arrays = self.map.arrays(slot)
        lent = {name: array for name, array in arrays.items() if name not in _COPIED}
        remaining = set(lent)

        def end_loan(name: str) -> None:
            remaining.discard(name)
            if not remaining:
                self._free.append(slot)

        for name, array in lent.items():
            weakref.finalize(array, end_loan, name).atexit = False
        return {name: torch.from_numpy(array) for name, array in lent.items()} | _copy(arrays, _COPIED)

    def copy_slot(self, slot: int) -> dict[str, Tensor]:
        """Return copies of the tensors of a slot, and free it."""
        self._reserved.remove(slot)
        arrays = self.map.arrays(slot)
        tensors = _copy(arrays, arrays)
        self._free.append(slot)
        return tensors

    def close(self) -> None:
        """Let the memory go as soon as no tensor uses it."""
        os.close(self.descriptor)
        if self._is_page_locked:
            release_finished_copies(wait=True)
            _cuda_runtime().cudaHostUnregister(_address(self.map))


def count_slab_bytes(layout: RowLayout, num_slots: int) -> int:
    """Return the size of a slab in bytes."""
    return _PAGE + num_slots * _place_tensors(layout)[1]


def _copy(arrays: Mapping[str, np.ndarray], names: "tuple[str, ...] | Mapping[str, np.ndarray]") -> dict[str, Tensor]:
    """Return copies of some arrays as tensors, pinned if CUDA is available."""
    pin = torch.cuda.is_available()
    copies = {}
    for name in names:
        source = torch.from_numpy(arrays[name])
        copies[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pin).copy_(source)
    return copies


def _place_tensors(layout: RowLayout) -> tuple[dict[str, int], int]:
    """Return the offset of every tensor in a slot, at a page's beginning, and the bytes of a slot."""
    offsets, end = {}, 0
    for name, shape, dtype in layout.shapes:
        offsets[name] = end
        num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        end += -(-num_bytes // _PAGE) * _PAGE
    return offsets, end


def _page_lock(slab_map: SlabMap) -> None:
    """Lock a slab's pages, so that copies from them to a GPU are asynchronous. Raises: OutOfMemoryError."""
    status = int(_cuda_runtime().cudaHostRegister(_address(slab_map), slab_map.num_bytes, _PORTABLE))
    if status:
        raise OutOfMemoryError(
            f"{slab_map.num_bytes / 1e9:.3g} GB for microbatches cannot be page-locked (CUDA error {status}): {_REMEDY}"
        )


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # PyTorch's stubs say that there may be none


def _address(slab_map: SlabMap) -> int:
    return np.frombuffer(slab_map.memory, np.uint8).ctypes.data
