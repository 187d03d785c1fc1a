"""Randomness as a pure function of the place in training.

Nothing here has state. A number is the hash of (seed, where, sample id, position), so it is the same on any rank,
device, thread and attempt, and a checkpoint has no generator state to hold. The hash is the finaliser of splitmix64
(Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), written so that one piece of code
serves NumPy and torch: signed 64-bit arithmetic that wraps, and shifts masked to be logical. NumPy promises no stable
stream between versions; tests/unit/test_seeding.py holds golden values for this one.
"""

import hashlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Int64Array = TypeVar("Int64Array", np.ndarray, Tensor)  # int64

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def derive_key(seed: int, *purpose: int | str) -> int:
    """A signed 64-bit key for a place: ``key(seed, epoch, "mask")``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def splitmix64(values: Int64Array) -> Int64Array:
    """splitmix64's finaliser, element by element, on int64."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * _FIRST
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


def _hash_grid(place: int, ids: Int64Array, counter: Int64Array) -> Int64Array:
    """Words of shape [ids, counter]: one stream per id, one word per counter."""
    stream = splitmix64(ids * _GOLDEN + place)
    return splitmix64(stream[:, None] + (counter + 1)[None, :] * _GOLDEN)


def draw_uniform(key: int, ids: Tensor, count: int) -> Tensor:
    """Uniform float32 in [0, 1) of shape [len(ids), count]; bit for bit the same on every device.

    ``place`` comes from ``key``; ``ids`` is int64 of shape [B] (sample ids, so that a row depends on the sample alone).
    """
    counter = torch.arange(count, device=ids.device, dtype=torch.int64)
    return ((_hash_grid(key, ids, counter) >> 40) & 0xFFFFFF).float() * 2.0**-24


def draw_uniform_numpy(key: int, ids: np.ndarray, count: int) -> np.ndarray:
    """``uniforms`` for host code: the same numbers, as a float32 array."""
    words = _hash_grid(key, ids.astype(np.int64), np.arange(count, dtype=np.int64))
    return ((words >> 40) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)


def draw_permutation(key: int, length: int) -> np.ndarray:
    """A permutation of range(length), int64: the stable order of hashed positions."""
    return np.argsort(splitmix64(np.arange(length, dtype=np.int64) * _GOLDEN + key), kind="stable")


def draw_integer(key: int, limit: int) -> int:
    """One integer in [0, limit)."""
    return int(splitmix64(np.array([key], dtype=np.int64)).view(np.uint64)[0]) % limit


def hash_ids(key: int, ids: np.ndarray) -> np.ndarray:
    """A hash per id, int64, to choose a subset by: the n lowest are a draw that depends on nothing but (place, id)."""
    return splitmix64(ids.astype(np.int64) * _GOLDEN + key)
