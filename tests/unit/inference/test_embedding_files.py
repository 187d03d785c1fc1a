"""Shards of embeddings at their edges."""

from pathlib import Path

import numpy as np
import pytest

from foveal.errors import DataError
from foveal.inference.decoding import UnreadableImage
from foveal.inference.embedding_files import EmbeddingShard, read_shard, read_unreadable, write_shard


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_a_shard_without_a_readable_image_is_one(suffix: str, tmp_path: Path) -> None:
    file, unreadable = tmp_path / f"features.{suffix}", [UnreadableImage("broken.png", "zero bytes")]
    write_shard(file, EmbeddingShard([], np.zeros((0, 5), np.float32), unreadable))
    assert read_shard(file, [5]).features.shape == (0, 5)
    assert read_unreadable(file) == unreadable
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read"):
        read_shard(file, [5])
