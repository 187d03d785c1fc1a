"""The pixels that an exported model gets, as its evaluation made them. C channels, H x W pixels."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from foveal.data.image.decode import DECODE_VERSION, decode_crop
from foveal.data.image.transforms import CropBox, compute_eval_crop, normalise
from foveal.weights.card import Card, eval_pixels_from_card


@dataclass(frozen=True)
class ImageTransform:
    """An image file to the model's input: upright, the centre crop, resized, normalised.

    image_hw: size of the input in pixels. crop_ratio: the crop's side over that of the largest centre crop.
    mean, std: of pixels in [0, 1], by channel. bit_depth: bits that pixels stored in 16 bits use.
    """

    image_hw: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    interpolation: str
    jpeg_scaling: bool
    decode_version: int = DECODE_VERSION
    bit_depth: int | None = None

    def __call__(self, image: bytes | str | Path | Image.Image) -> Tensor:
        """Return the input float32 [C, H, W] of an image, its file or the file's bytes.

        Raises: UndecodableError for bytes that are no image; OSError.
        """
        return normalise(self.to_pixels(image)[None], self.mean, self.std)[0]

    def to_pixels(self, image: bytes | str | Path | Image.Image) -> Tensor:
        """Return the same before the normalisation, uint8 [C, H, W]."""

        def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
            return compute_eval_crop(width, height, self.crop_ratio, self.image_hw), False

        pixels = decode_crop(
            _read_bytes(image),
            self.channels,
            choose_crop,
            self.image_hw,
            self.interpolation,
            self.jpeg_scaling,
            self.decode_version,
            self.bit_depth,
        )
        return torch.from_numpy(pixels.copy())  # one channel for three is a view without strides of its own


def transform_from_card(card: Card) -> ImageTransform:
    """Return the transform of a model's evaluation; what its run did not state is as in a run without settings."""
    pixels = eval_pixels_from_card(card)
    return ImageTransform(
        image_hw=pixels.eval_hw,
        channels=pixels.channels,
        mean=pixels.mean,
        std=pixels.std,
        crop_ratio=pixels.crop_ratio,
        interpolation=pixels.interpolation,
        jpeg_scaling=pixels.jpeg_scaling,
        decode_version=pixels.decode_version,
        bit_depth=pixels.bit_depth,
    )


def _read_bytes(image: bytes | str | Path | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    file = io.BytesIO()
    image.save(file, "PNG")  # without loss, and read by the same rules
    return file.getvalue()
