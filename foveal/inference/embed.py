"""Embeddings of images in numbered shards, by any number of ranks: rank r of n makes the shards r, r + n, r + 2 n, ...

Ranks exchange nothing. A shard's images are cut into the same batches by every rank, so that its bytes do not depend on
the number of ranks.
"""

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from foveal.errors import ConfigError
from foveal.inference.decoding import UnreadableImage, iter_decoded_batches
from foveal.inference.embedder import Embedder
from foveal.inference.embedding_files import (
    FILE_FORMATS,
    EmbeddingManifest,
    EmbeddingShard,
    join_embeddings,
    read_unreadable,
    write_shard,
)
from foveal.inference.image_inputs import ImageList
from foveal.inference.predict import explain_out_of_memory

_POOLED_SHARD_SIZE, _PATCHES_SHARD_SIZE = 10_000, 256  # images; a shard is held in memory until it is written
_POLL_SECONDS, _MAX_WAIT_SECONDS = 1.0, 600.0  # of a rank that waits for the shards of others
Progress = Callable[[int, int], None]  # finished and all images of this rank


def plan_embeddings(
    embedder: Embedder, images: ImageList, *, file_format: str = "parquet", shard_size: int | None = None
) -> EmbeddingManifest:
    """Return the manifest of the features of these images. Raises: ConfigError for an unknown format."""
    if file_format not in FILE_FORMATS:
        raise ConfigError(f"--format {file_format} does not exist; there are {', '.join(FILE_FORMATS)}")
    transform = embedder.transform
    one_image = torch.zeros(1, transform.channels, *transform.image_hw, dtype=torch.uint8)
    default_size = _PATCHES_SHARD_SIZE if embedder.feature == "patches" else _POOLED_SHARD_SIZE
    return EmbeddingManifest(
        export=embedder.card.sha256,
        feature=embedder.feature,
        layer=embedder.layer,
        feature_shape=list(embedder(one_image).shape[1:]),
        transform=transform.to_dict(),
        images=len(images),
        images_sha256=images.digest(),
        shard_size=default_size if shard_size is None else shard_size,
        file_format=file_format,
    )


def embed_images(
    embedder: Embedder,
    images: ImageList,
    manifest: EmbeddingManifest,
    folder: Path,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Progress = lambda _finished, _total: None,
) -> list[UnreadableImage]:
    """Write the shards of a rank that do not exist yet; return the unreadable images of all of its shards.

    Raises: ConfigError if the folder holds other embeddings; DataError if it cannot be written.
    """
    join_embeddings(folder, manifest)
    numbers = range(rank, manifest.num_shards, world_size)
    total = sum(len(manifest.shard_positions(number)) for number in numbers)
    unreadable: list[UnreadableImage] = []
    finished = 0
    for number in numbers:
        file, positions = manifest.shard_file(folder, number), manifest.shard_positions(number)
        if file.exists():
            unreadable += read_unreadable(file)
        else:
            shard = _embed_shard(
                embedder,
                images,
                manifest,
                positions,
                batch_size,
                lambda in_shard, before=finished: on_progress(before + in_shard, total),
            )
            write_shard(file, shard)
            unreadable += shard.unreadable
        finished += len(positions)
        on_progress(finished, total)
    return unreadable


def wait_for_all_shards(folder: Path, manifest: EmbeddingManifest) -> None:
    """Wait until the shards of all ranks exist, or for ten minutes nothing has come.

    A launcher ends the other ranks when one ends with an exit code; unreadable images are no reason for that.
    """
    num_missing, since = len(manifest.missing_shards(folder)), time.monotonic()
    while num_missing and time.monotonic() - since < _MAX_WAIT_SECONDS:
        time.sleep(_POLL_SECONDS)
        now_missing = len(manifest.missing_shards(folder))
        if now_missing < num_missing:
            num_missing, since = now_missing, time.monotonic()


def _embed_shard(
    embedder: Embedder,
    images: ImageList,
    manifest: EmbeddingManifest,
    positions: range,
    batch_size: int,
    on_progress: Callable[[int], None],
) -> EmbeddingShard:
    names: list[str] = []
    blocks: list[np.ndarray] = []
    unreadable: list[UnreadableImage] = []
    finished = 0
    with closing(iter_decoded_batches(images, positions, embedder.transform, batch_size)) as batches:
        for batch in batches:
            if batch.names:
                with explain_out_of_memory(len(batch.names)):
                    blocks.append(embedder(batch.pixels))
            names += batch.names
            unreadable += batch.unreadable
            finished += batch.num_images
            on_progress(finished)
    dtype = np.float16 if manifest.feature == "patches" else np.float32
    features = np.concatenate(blocks) if blocks else np.zeros((0, *manifest.feature_shape), dtype)
    return EmbeddingShard(names, features, unreadable)
