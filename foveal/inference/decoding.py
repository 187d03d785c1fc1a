"""Images in batches, decoded by threads while the model computes, with a bounded number of them in memory."""

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from foveal.data.image.decode import UndecodableError
from foveal.errors import DataError, StorageUnreachableError
from foveal.inference.image_inputs import ImageInput, ImageList
from foveal.inference.image_transform import ImageFrame, ImageTransform

_MAX_THREADS = 16  # decoders leave Python's lock for most of their time


@dataclass(frozen=True)
class UnreadableImage:
    """An image that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class DecodedBatch:
    """Images of consecutive positions. The unreadable ones among them have no pixels, no frame and no name here.

    num_images: with the unreadable ones. names and frames: of the readable ones. pixels: theirs, uint8 [B, C, H, W].
    """

    num_images: int
    names: tuple[str, ...]
    positions: tuple[int, ...]
    pixels: Tensor
    frames: tuple[ImageFrame, ...]
    unreadable: tuple[UnreadableImage, ...]


@dataclass(frozen=True)
class _Decoded:
    name: str
    position: int
    pixels: Tensor
    frame: ImageFrame


def iter_decoded_batches(
    images: ImageList, positions: Sequence[int], transform: ImageTransform, batch_size: int
) -> Generator[DecodedBatch, None, None]:
    """Yield the images at these positions in batches of ``batch_size``, in order; the last one may be smaller.

    At most two further batches are decoded ahead; close the generator to end its threads. Raises: StorageUnreachableError if storage is away.
    """

    def decode(position: int) -> _Decoded | UnreadableImage:
        return _decode(images[position], position, transform)

    upcoming, num_threads = iter(positions), min(_MAX_THREADS, os.cpu_count() or 1)
    # Each decodes on one core: torch would start as many threads again for every one of them.
    with ThreadPoolExecutor(num_threads, "foveal-decode", torch.set_num_threads, (1,)) as pool:
        pending = deque(pool.submit(decode, position) for position in islice(upcoming, 2 * batch_size))
        try:
            while pending:
                results: list[_Decoded | UnreadableImage] = []
                while pending and len(results) < batch_size:
                    results.append(pending.popleft().result())
                    pending.extend(pool.submit(decode, position) for position in islice(upcoming, 1))
                yield _collate(results, transform)
        finally:  # after Ctrl-C or an error nothing more is decoded
            _cancel(pending)


def _decode(image: ImageInput, position: int, transform: ImageTransform) -> _Decoded | UnreadableImage:
    try:
        pixels, frame = transform.decode(image.read(), image.bit_depth)
    except StorageUnreachableError:
        raise
    except (UndecodableError, DataError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return UnreadableImage(image.name, reason)
    return _Decoded(image.name, position, pixels, frame)


def _collate(results: Sequence[_Decoded | UnreadableImage], transform: ImageTransform) -> DecodedBatch:
    decoded = [result for result in results if isinstance(result, _Decoded)]
    unreadable = [result for result in results if isinstance(result, UnreadableImage)]
    empty = torch.zeros(0, transform.channels, *transform.image_hw, dtype=torch.uint8)
    return DecodedBatch(
        len(results),
        tuple(result.name for result in decoded),
        tuple(result.position for result in decoded),
        torch.stack([result.pixels for result in decoded]) if decoded else empty,
        tuple(result.frame for result in decoded),
        tuple(unreadable),
    )


def _cancel(pending: "deque[Future[_Decoded | UnreadableImage]]") -> None:
    for future in pending:
        future.cancel()
