"""Stateless randomness: a random number is a pure function of seed, purpose, sample id and position.

A number is the same on any rank, device, thread and attempt, and a checkpoint holds no generator state. The hash is the
finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), with the
same code for NumPy and torch: signed 64-bit arithmetic that wraps, and shifts masked to be logical. NumPy promises no
stable stream between versions; tests/unit/test_seeding.py holds golden values for this hash.
"""

import hashlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Int64Array = TypeVar("Int64Array", np.ndarray, Tensor)  # int64

_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def derive_key(seed: int, *purpose: int | str) -> int:
    """Return a signed 64-bit key of a seed and a purpose: ``derive_key(seed, epoch, "mask")``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def splitmix64(values: Int64Array) -> Int64Array:
    """Apply splitmix64's finaliser to each int64 element."""
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * _MULTIPLIER_1
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * _MULTIPLIER_2
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


def _hash_grid(key: int, ids: Int64Array, counter: Int64Array) -> Int64Array:
    """Return hashes [len(ids), len(counter)]: a stream per id, a word per counter."""
    stream = splitmix64(ids * _GOLDEN_RATIO + key)
    return splitmix64(stream[:, None] + (counter + 1)[None, :] * _GOLDEN_RATIO)


def draw_uniform(key: int, ids: Tensor, count_per_id: int) -> Tensor:
    """Return uniform float32 in [0, 1) of shape [len(ids), count]; bit for bit the same on every device.

    ``key`` comes from ``derive_key``; ``ids`` is int64 [B] (sample ids, so that a row depends on its sample only).
    """
    counter = torch.arange(count_per_id, device=ids.device, dtype=torch.int64)
    return ((_hash_grid(key, ids, counter) >> 40) & 0xFFFFFF).float() * 2.0**-24


def draw_uniform_numpy(key: int, ids: np.ndarray, count_per_id: int) -> np.ndarray:
    """Return the numbers of ``draw_uniform`` as a float32 array, for host code."""
    words = _hash_grid(key, ids.astype(np.int64), np.arange(count_per_id, dtype=np.int64))
    return ((words >> 40) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)


def draw_permutation(key: int, length: int) -> np.ndarray:
    """Return a permutation of range(length), int64: the stable argsort of hashed positions."""
    return np.argsort(splitmix64(np.arange(length, dtype=np.int64) * _GOLDEN_RATIO + key), kind="stable")


def draw_integer(key: int, exclusive_limit: int) -> int:
    """Return an integer in [0, limit)."""
    return int(splitmix64(np.array([key], dtype=np.int64)).view(np.uint64)[0]) % exclusive_limit


def hash_ids(key: int, ids: np.ndarray) -> np.ndarray:
    """Return an int64 hash per id, to choose a subset: the n lowest hashes depend only on the key and the ids."""
    return splitmix64(ids.astype(np.int64) * _GOLDEN_RATIO + key)
