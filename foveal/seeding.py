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

Words = TypeVar("Words", np.ndarray, Tensor)  # int64

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def key(seed: int, *where: int | str) -> int:
    """A signed 64-bit key for a place: ``key(seed, epoch, "mask")``."""
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def scramble(words: Words) -> Words:
    """splitmix64's finaliser, element by element, on int64."""
    words = (words ^ ((words >> 30) & 0x3FFFFFFFF)) * _FIRST
    words = (words ^ ((words >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return words ^ ((words >> 31) & 0x1FFFFFFFF)


def _streams(place: int, ids: Words, counter: Words) -> Words:
    """Words of shape [ids, counter]: one stream per id, one word per counter."""
    stream = scramble(ids * _GOLDEN + place)
    return scramble(stream[:, None] + (counter + 1)[None, :] * _GOLDEN)


def uniforms(place: int, ids: Tensor, count: int) -> Tensor:
    """Uniform float32 in [0, 1) of shape [len(ids), count]; bit for bit the same on every device.

    ``place`` comes from ``key``; ``ids`` is int64 of shape [B] (sample ids, so that a row depends on the sample alone).
    """
    counter = torch.arange(count, device=ids.device, dtype=torch.int64)
    return ((_streams(place, ids, counter) >> 40) & 0xFFFFFF).float() * 2.0**-24


def uniforms_numpy(place: int, ids: np.ndarray, count: int) -> np.ndarray:
    """``uniforms`` for host code: the same numbers, as a float32 array."""
    words = _streams(place, ids.astype(np.int64), np.arange(count, dtype=np.int64))
    return ((words >> 40) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)


def permutation(place: int, length: int) -> np.ndarray:
    """A permutation of range(length), int64: the stable order of hashed positions."""
    return np.argsort(scramble(np.arange(length, dtype=np.int64) * _GOLDEN + place), kind="stable")


def below(place: int, limit: int) -> int:
    """One integer in [0, limit)."""
    return int(scramble(np.array([place], dtype=np.int64)).view(np.uint64)[0]) % limit


def ranks_of(place: int, ids: np.ndarray) -> np.ndarray:
    """A hash per id, int64, to choose a subset by: the n lowest are a draw that depends on nothing but (place, id)."""
    return scramble(ids.astype(np.int64) * _GOLDEN + place)
