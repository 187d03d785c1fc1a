"""The pixels that an exported model gets, as its evaluation made them. C channels, H x W pixels."""

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foveal.data.image.decode import DECODE_VERSION, UndecodableError, decode_crop, pixel_slice
from foveal.data.image.transforms import CropBox, compute_eval_crop, normalise
from foveal.weights.card import Card, eval_pixels_from_card

_OTHER_INTEGERS, _MAX_UINT16 = ("I", "I;16B", "I;16L", "I;16N"), 0xFFFF
_PNG_MODES = ("1", "L", "P", "RGB", "I;16")  # an alpha channel is dropped in any case


@dataclass(frozen=True)
class ImageFrame:
    """The place of a model's input in its image.

    image_wh: width and height of the upright image. crop: (left, top, right, bottom) of the pixels that the input shows.
    """

    image_wh: tuple[int, int]
    crop: tuple[int, int, int, int]

    def boxes_to_image(self, boxes: Tensor, input_hw: tuple[int, int]) -> Tensor:
        """Return boxes [N, 4] (left, top, right, bottom) in pixels of the image, of boxes in pixels of the input."""
        left, top, right, bottom = self.crop
        scale = boxes.new_tensor([(right - left) / input_hw[1], (bottom - top) / input_hw[0]] * 2)
        return boxes * scale + boxes.new_tensor([left, top] * 2)

    def ids_to_image(self, ids: np.ndarray, outside: int) -> np.ndarray:
        """Return ids of the image's pixels by nearest neighbour, of the input's [H, W]; ``outside`` where it shows none."""
        left, top, right, bottom = self.crop
        rows, columns = _nearest(bottom - top, ids.shape[0]), _nearest(right - left, ids.shape[1])
        image_ids = np.full(self.image_wh[::-1], outside, ids.dtype)
        image_ids[top:bottom, left:right] = ids[rows[:, None], columns]
        return image_ids


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
        return self.normalise(self.to_pixels(image)[None])[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return inputs float32 [B, C, H, W] of pixels uint8 [B, C, H, W], on the device of the pixels."""
        return normalise(pixels, self.mean, self.std)

    def to_pixels(self, image: bytes | str | Path | Image.Image) -> Tensor:
        """Return the same before the normalisation, uint8 [C, H, W]."""
        return self.decode(_read_bytes(image))[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def decode(self, data: bytes, bit_depth: int | None = None) -> tuple[Tensor, ImageFrame]:
        """Return the pixels uint8 [C, H, W] of an image file's bytes, and their place in the image.

        ``bit_depth``: that of a data set, in place of the transform's. Raises: UndecodableError.
        """
        frames: list[ImageFrame] = []

        def choose_crop(width: int, height: int) -> tuple[CropBox, bool]:
            box = compute_eval_crop(width, height, self.crop_ratio, self.image_hw)
            frames.append(ImageFrame((width, height), _round_box(box, width, height)))
            return box, False

        pixels = decode_crop(
            data,
            self.channels,
            choose_crop,
            self.image_hw,
            self.interpolation,
            self.jpeg_scaling,
            self.decode_version,
            bit_depth or self.bit_depth,
        )
        # One channel for three is a view without strides of its own.
        return torch.from_numpy(pixels.copy()), frames[0]


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


def _round_box(box: CropBox, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the pixels that ``decode_crop`` reads for a box, without a JPEG's scaling: that moves less than a pixel."""
    left, top, right, bottom = box
    columns, rows = pixel_slice(left, right, 1, width), pixel_slice(top, bottom, 1, height)
    return columns.start, rows.start, min(columns.stop, width), min(rows.stop, height)


def _nearest(num_pixels: int, num_ids: int) -> np.ndarray:
    """Return the position of the nearest of ``num_ids`` ids for each of ``num_pixels`` pixels along an axis."""
    return ((np.arange(num_pixels) + 0.5) * num_ids / num_pixels).astype(np.int64).clip(0, num_ids - 1)


def _read_bytes(image: bytes | str | Path | Image.Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    file, exif = io.BytesIO(), image.getexif()  # which has the orientation that a camera has noted
    if image.mode == "F":
        raise UndecodableError("pixels of floating point are not supported")
    if image.mode in _OTHER_INTEGERS:  # a PNG has 16 bits at most
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_UINT16:
            raise UndecodableError("pixels of more than 16 bits, or below 0, are not supported")
        image = Image.fromarray(values.astype(np.uint16))
    stored = image if image.mode in _PNG_MODES else image.convert("RGB")
    stored.save(file, "PNG", exif=exif)  # without loss, and read by the same rules
    return file.getvalue()
