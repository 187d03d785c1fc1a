"""Pictures for the tests of decoding, and their files."""

import io
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int, height: int) -> Image.Image:
    """Blotches, edges and grain in RGB: about as many bytes a pixel as a photograph has."""
    random = np.random.default_rng(0)
    total = np.full((height, width, 3), 128, dtype=np.float32)
    for step in (60, 12, 3):
        coarse = random.normal(0, 40, (3, max(2, height // step), max(2, width // step))).astype(np.float32)
        total += np.stack([np.asarray(Image.fromarray(plane).resize((width, height))) for plane in coarse], axis=-1)
    return Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
