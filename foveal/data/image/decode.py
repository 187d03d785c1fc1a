"""From the bytes of an image file to the uint8 square that a model sees.

What counts as an image, and every pixel of it, is the same whether simplejpeg is installed or not: Pillow always reads
the header, simplejpeg may then decode what libjpeg finds no fault with, and Pillow decodes, or refuses, all the rest.
Resizing is PyTorch's: its uint8 antialiased kernels are Pillow's filters, two to five times as fast.
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

CropFunction = Callable[
    [int, int], tuple[CropBox, bool]
]  # (width, height) of the upright image -> the crop, and whether flipped

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # of Pillow's forty, some start other programs
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
_SCALES = (8, 4, 2)  # libjpeg's other factors save less than they cost
_LOSSLESS = re.compile(rb"\xff[\xc3\xc7\xcb\xcf]")  # frames that cannot be scaled: TurboJPEG 3 crashes when it tries
_ORIENTATION = 0x0112
# How the stored image becomes the upright one, by EXIF's number: (transposed, then flipped left-right, then top-bottom)
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
    """Bytes that are no whole image; the text is the reason, the same on every machine."""


def jpeg_decoder_name() -> str:
    """What decodes JPEGs in this process, with its version."""
    name = "Pillow" if simplejpeg is None else "simplejpeg"
    return f"{name} {version(name)}"


def decode_image(data: bytes, channels: int) -> Image.Image:
    """The whole image, upright, in mode L (1 channel) or RGB (3).

    Transparency is dropped, of 16 bits the upper 8 stay, an animation gives its first frame. Raises: Undecodable.
    """
    with _translate_errors():
        image = _open_image(data)
        picture = _load_pixels(image, channels, 1)
        transposed, mirrored, inverted = _read_orientation(image)
    if transposed:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if inverted:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture.convert("RGB") if channels == 3 else picture


def decode_crop(
    data: bytes,
    channels: int,
    choose_crop: CropFunction,
    output_hw: tuple[int, int],
    interpolation: str,
    jpeg_scaling: bool,
) -> np.ndarray:
    """The view of an image, resized to ``sides``: uint8 [channels, height, width].

    The box is rounded to whole pixels, cut out, and resized (bicubic or bilinear, with antialiasing). ``scaling``: a
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the box still has as many pixels on both sides then.
    Raises: Undecodable, as ``decode``; what ``view`` raises.
    """
    with _translate_errors():
        image = _open_image(data)
        stored = None if isinstance(image, JpegImageFile) else _load_pixels(image, channels, 1)
        transposed, mirrored, inverted = turn = _read_orientation(image)
    width, height = image.size[::-1] if transposed else image.size
    box, flipped = choose_crop(width, height)
    left, top, right, bottom = _stored_box(box, width, height, turn)
    high, wide = output_hw[::-1] if transposed else output_hw
    scale = 1
    if stored is None:
        if jpeg_scaling and not _LOSSLESS.search(data):
            scale = next((s for s in _SCALES if right - left >= s * wide and bottom - top >= s * high), 1)
        with _translate_errors():
            array = _decode_jpeg(data, image, channels, scale)
    else:
        array = np.asarray(stored)
    across, down = _pixel_slice(left, right, scale, array.shape[1]), _pixel_slice(top, bottom, scale, array.shape[0])
    seen = _resize(array[down, across], (high, wide), interpolation)
    if transposed:
        seen = seen.transpose(-1, -2)
    turned = [axis for axis, turns in ((-1, mirrored != flipped), (-2, inverted)) if turns]
    seen = seen.flip(turned) if turned else seen
    return seen.expand(channels, -1, -1).numpy()


def decode_mask_crop(
    data: bytes, box: CropBox, flipped: bool, output_hw: tuple[int, int]
) -> tuple[tuple[int, int], np.ndarray]:
    """(width, height) of a mask, and the ids in a box of it, resized to ``sides`` by the nearest: int32 [height, width].

    A palette's numbers are the ids, as are grey pixels of 8 or 16 bits. Raises: Undecodable.
    """
    with _translate_errors():
        image = _open_image(data)
        image.load()
        if image.mode not in {"1", "L", "P", "I", *_SIXTEEN_BIT}:
            raise UndecodableError(f"pixels of mode {image.mode} are no ids; one channel or a palette is")
        array = np.asarray(image).astype(np.int32)
    left, top, right, bottom = box
    part = array[_pixel_slice(top, bottom, 1, array.shape[0]), _pixel_slice(left, right, 1, array.shape[1])]
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(output_hw, part.shape, strict=True))
    seen = part[rows[:, None], columns[None, :]]
    return image.size, np.ascontiguousarray(seen[:, ::-1] if flipped else seen)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn whatever Pillow's readers raise (OSError, SyntaxError, struct.error, EOFError, ...) into Undecodable."""
    try:
        yield
    except (MemoryError, UndecodableError):
        raise
    except UnidentifiedImageError:  # its text has an address in memory
        raise UndecodableError(
            f"no image in one of the formats {', '.join(_FORMATS)}, or its header is damaged"
        ) from None
    except Exception as error:  # noqa: BLE001
        raise UndecodableError(" ".join(str(error).split()) or type(error).__name__) from None


def _open_image(data: bytes) -> Image.Image:
    """The header of an image of a sane size."""
    if not data:
        raise UndecodableError("zero bytes")
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UndecodableError(f"{image.width}x{image.height} pixels are more than Pillow's limit")
    return image


def _read_orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """How to turn an image upright; for all formats but JPEG, to be asked after it is loaded."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return _UPRIGHT
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION, 1), _UPRIGHT)
    except Exception:  # noqa: BLE001 - pixels are whole where their description is not
        return _UPRIGHT


def _load_pixels(image: Image.Image, channels: int, scale: int) -> Image.Image:
    """Pillow's decoded image, as stored, in mode L or RGB; a JPEG's luminance alone where one channel is wanted."""
    size = (image.width // scale, image.height // scale) if scale > 1 else None
    image.draft("L" if channels == 1 else "RGB", size)
    image.load()
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _EIGHT_BIT:
        raise UndecodableError(f"pixels of mode {image.mode} are not supported, 8 or 16 bits per channel are")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow wants palettes with transparency to go this way
    return image.convert("L" if channels == 1 or image.mode in ("1", "L", "LA") else "RGB")


def _decode_jpeg(data: bytes, image: Image.Image, channels: int, scale: int) -> np.ndarray:
    """A JPEG at 1/scale of its size: uint8 [h, w], [h, w, 3], or [h, w, 4] (the last is filler: 5 % faster here)."""
    width, height = -(-image.width // scale), -(-image.height // scale)
    if simplejpeg is not None and image.mode in ("L", "RGB"):
        grey = channels == 1 or image.mode == "L"
        with contextlib.suppress(ValueError):  # libjpeg warns: Pillow knows whether it is truncated or only odd
            array = simplejpeg.decode_jpeg(data, "GRAY" if grey else "RGBX", min_height=height, min_width=width)
            if array.shape[:2] == (height, width):
                return array
    return np.asarray(_load_pixels(image, channels, scale))


def _stored_box(box: CropBox, width: int, height: int, turn: tuple[bool, bool, bool]) -> CropBox:
    """Where a box of the upright image of width x height lies in the stored one."""
    left, top, right, bottom = box
    transposed, mirrored, inverted = turn
    if mirrored:
        left, right = width - right, width - left
    if inverted:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if transposed else (left, top, right, bottom)


def _pixel_slice(start: float, stop: float, scale: int, size: int) -> slice:
    """The pixels from start to stop at 1/scale: halves round up on both sides, so that no pixel of the width is lost."""
    first = min(math.floor(start / scale + 0.5), size - 1)
    return slice(first, max(first + 1, math.floor(stop / scale + 0.5)))


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """uint8 [h, w] or [h, w, C] to uint8 [C, *size], at most 3 of the channels."""
    if not array.flags.writeable:  # Pillow's memory; PyTorch warns of it
        array = array.copy()
    planes = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode=interpolation, antialias=True)[0, :3]
