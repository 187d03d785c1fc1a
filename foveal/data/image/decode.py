"""Image decoding: from the bytes of an image file to the uint8 pixels of the model's input.

Which files decode, and to which pixels, does not depend on simplejpeg: Pillow always reads the header, simplejpeg
decodes a JPEG that libjpeg accepts without a warning, and Pillow decodes or refuses everything else.
PyTorch resizes: its uint8 antialiased kernels are Pillow's filters, two to five times as fast.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from foveal.data.image.transforms import CropBox

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# (width, height) of the upright image -> (crop, whether it is flipped)
CropFunction = Callable[[int, int], tuple[CropBox, bool]]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # some of Pillow's forty formats start other programs
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
_SCALES = (8, 4, 2)  # libjpeg's other factors save less than they cost
_LOSSLESS = re.compile(rb"\xff[\xc3\xc7\xcb\xcf]")  # frames that cannot be scaled: TurboJPEG 3 crashes on them
_ORIENTATION = 0x0112
# EXIF orientation -> steps from the stored to the upright image: (transpose, then flip left-right, then top-bottom)
_ORIENTATIONS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_UPRIGHT = (False, False, False)


class UndecodableError(ValueError):
    """Bytes that are not a complete image; the message is the reason, the same on every machine."""


def jpeg_decoder_and_version() -> str:
    """Return the name and version of the library that decodes JPEGs in this process."""
    name = "Pillow" if simplejpeg is None else "simplejpeg"
    return f"{name} {version(name)}"


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Return the full image, upright, in mode L (1 channel) or RGB (3).

    Transparency is dropped, 16-bit pixels keep their upper 8 bits, an animation gives its first frame.
    Raises: UndecodableError.
    """
    with _translate_errors():
        image = _open_image(data)
        pixels = _load_pixels(image, channels, 1)
        transposed, mirrored, inverted = _read_orientation(image)
    if transposed:
        pixels = pixels.transpose(Image.Transpose.TRANSPOSE)
    if mirrored:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if inverted:
        pixels = pixels.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return pixels.convert("RGB") if channels == 3 else pixels


def decode_crop(
    data: bytes,
    channels: int,
    choose_crop: CropFunction,
    output_hw: tuple[int, int],
    interpolation: str,
    jpeg_scaling: bool,
) -> np.ndarray:
    """Return a crop of an image, resized to ``output_hw``: uint8 [channels, height, width].

    The crop box is rounded to integer pixels, then resized (bicubic or bilinear, with antialiasing). jpeg_scaling:
    decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop then still has at least ``output_hw`` pixels.
    Raises: UndecodableError, as ``decode_image``; any exception of ``choose_crop``.
    """
    with _translate_errors():
        image = _open_image(data)
        stored = None if isinstance(image, JpegImageFile) else _load_pixels(image, channels, 1)
        orientation = _read_orientation(image)
    transposed, mirrored, inverted = orientation
    width, height = image.size[::-1] if transposed else image.size
    box, flipped = choose_crop(width, height)
    left, top, right, bottom = _stored_box(box, width, height, orientation)
    stored_hw = (output_hw[1], output_hw[0]) if transposed else output_hw
    scale = 1
    if stored is None:
        if jpeg_scaling and not _LOSSLESS.search(data):
            scale = next(
                (s for s in _SCALES if right - left >= s * stored_hw[1] and bottom - top >= s * stored_hw[0]), 1
            )
        with _translate_errors():
            array = _decode_jpeg(data, image, channels, scale)
    else:
        array = np.asarray(stored)
    columns = _pixel_slice(left, right, scale, array.shape[1])
    rows = _pixel_slice(top, bottom, scale, array.shape[0])
    pixels = _resize(array[rows, columns], stored_hw, interpolation)
    if transposed:
        pixels = pixels.transpose(-1, -2)
    flipped_axes = [axis for axis, is_flipped in ((-1, mirrored != flipped), (-2, inverted)) if is_flipped]
    if flipped_axes:
        pixels = pixels.flip(flipped_axes)
    return pixels.expand(channels, -1, -1).numpy()


def decode_mask_crop(
    data: bytes, box: CropBox, flipped: bool, output_hw: tuple[int, int]
) -> tuple[tuple[int, int], np.ndarray]:
    """Return (width, height) of a mask, and the ids of a crop, nearest-neighbour resized: int32 [height, width].

    ``output_hw`` is the size of the result. The ids are palette indices, or grey pixels of 8 or 16 bits.
    Raises: UndecodableError.
    """
    with _translate_errors():
        image = _open_image(data)
        image.load()
        if image.mode not in {"1", "L", "P", "I", *_SIXTEEN_BIT}:
            raise UndecodableError(
                f"pixels of mode {image.mode} are not class ids: one grey channel or a palette is needed"
            )
        array = np.asarray(image).astype(np.int32)
    left, top, right, bottom = box
    crop = array[_pixel_slice(top, bottom, 1, array.shape[0]), _pixel_slice(left, right, 1, array.shape[1])]
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(output_hw, crop.shape, strict=True))
    ids = crop[rows[:, None], columns[None, :]]
    return image.size, np.ascontiguousarray(ids[:, ::-1] if flipped else ids)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn exceptions of Pillow's readers (OSError, SyntaxError, struct.error, EOFError, ...) into UndecodableError."""
    try:
        yield
    except (MemoryError, UndecodableError):
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        raise UndecodableError(
            f"no image in one of the formats {', '.join(_FORMATS)}, or its header is damaged"
        ) from None
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(" ".join(str(error).split()) or type(error).__name__) from None


def _open_image(data: bytes) -> Image.Image:
    """Read the header of an image and check its size against Pillow's limit. Raises: UndecodableError."""
    if not data:
        raise UndecodableError("zero bytes")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UndecodableError(f"{image.width}x{image.height} pixels are more than Pillow's limit")
    return image


def _read_orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """Return (transposed, mirrored, inverted) of an image; in formats other than JPEG only valid after loading."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return _UPRIGHT
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION, 1), _UPRIGHT)
    except Exception:  # noqa: BLE001 - damaged EXIF data does not make the pixels bad
        return _UPRIGHT


def _load_pixels(image: Image.Image, channels: int, scale: int) -> Image.Image:
    """Decode with Pillow, as stored, to mode L or RGB; for one channel only a JPEG's luminance is decoded."""
    size = (image.width // scale, image.height // scale) if scale > 1 else None
    image.draft("L" if channels == 1 else "RGB", size)
    image.load()
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _EIGHT_BIT:
        raise UndecodableError(f"pixels of mode {image.mode} are not supported, 8 or 16 bits per channel are")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns unless a palette with transparency goes through RGBA
    return image.convert("L" if channels == 1 or image.mode in ("1", "L", "LA") else "RGB")


def _decode_jpeg(data: bytes, image: Image.Image, channels: int, scale: int) -> np.ndarray:
    """Decode a JPEG at 1/scale of its size: uint8 [h, w], [h, w, 3], or [h, w, 4] (a padding channel: 5 % faster)."""
    width, height = -(-image.width // scale), -(-image.height // scale)
    if simplejpeg is not None and image.mode in ("L", "RGB"):
        grey = channels == 1 or image.mode == "L"
        with contextlib.suppress(ValueError):  # libjpeg warns: Pillow decides whether the file is truncated
            array = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGBX", min_height=height, min_width=width)
            if array.shape[:2] == (height, width):
                return array
    return np.asarray(_load_pixels(image, channels, scale))


def _stored_box(box: CropBox, width: int, height: int, orientation: tuple[bool, bool, bool]) -> CropBox:
    """Convert a box of the upright image (width x height) to coordinates of the stored image."""
    left, top, right, bottom = box
    transposed, mirrored, inverted = orientation
    if mirrored:
        left, right = width - right, width - left
    if inverted:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if transposed else (left, top, right, bottom)


def _pixel_slice(start: float, stop: float, scale: int, size: int) -> slice:
    """Return the pixels from start to stop at 1/scale; both ends round half up, which keeps the width."""
    first = min(math.floor(start / scale + 0.5), size - 1)
    return slice(first, max(first + 1, math.floor(stop / scale + 0.5)))


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize uint8 [h, w] or [h, w, C] to uint8 [min(C, 3), *size]."""
    if not array.flags.writeable:  # Pillow's own memory, of which PyTorch warns
        array = array.copy()
    planes = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode=interpolation, antialias=True)[0, :3]
