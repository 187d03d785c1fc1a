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
from importlib.metadata import version as version_of

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from foveal.data.image.png import drop_long_texts
from foveal.data.image.tiff import count_bits, describe_contents, find_misread_property, is_white_zero, silence_libtiff
from foveal.data.image.transforms import CropBox

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# (width, height) of the upright image -> (crop, whether it is flipped)
CropFunction = Callable[[int, int], tuple[CropBox, bool]]

DECODE_VERSION = 2  # newest rules by which files become pixels, see data.decode_version
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # some of Pillow's forty formats start other programs
_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
BIT_DEPTH_OPTION = "`foveal data index FOLDER --bit-depth BITS`"  # what an error advises; a packer has its own
_CONTAINER_BITS = 16
_SUSPICIOUS_BITS = 14  # upper 2 of 16 bits unused: at most 64 of 256 grey levels would remain
_FEW = 1e-3  # of the pixels of an image
_MAX_UINT16 = 0xFFFF
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
    return f"{name} {version_of(name)}"


def decode_image(
    data: bytes, channels: int, version: int = DECODE_VERSION, bit_depth: int | None = None
) -> Image.Image:
    """Return the full image, upright, in mode L (1 channel) or RGB (3).

    Transparency is dropped, pixels of more than 8 bits keep the upper 8 of the bits that they use, an animation gives
    its first frame. version: the rules of reading (``data.decode_version``). bit_depth: bits that pixels stored in 16
    bits use (None: 16, and an image that leaves the upper 2 unused is refused).
    Raises: UndecodableError.
    """
    with translate_errors():
        image = open_image(data, version)
        pixels = _load_pixels(image, channels, 1, version, bit_depth)
        transposed, mirrored, inverted = read_orientation(image)
    if transposed:
        pixels = pixels.transpose(Image.Transpose.TRANSPOSE)
    if mirrored:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if inverted:
        pixels = pixels.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return pixels.convert("RGB") if channels == 3 else pixels


def read_image_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an upright image; of a JPEG only the header is read. Raises: UndecodableError."""
    with translate_errors():
        image = open_image(data)
        if not isinstance(image, JpegImageFile):
            image.load()
        transposed, _, _ = read_orientation(image)
    return (image.height, image.width) if transposed else image.size


def decode_crop(
    data: bytes,
    channels: int,
    choose_crop: CropFunction,
    output_hw: tuple[int, int],
    interpolation: str,
    jpeg_scaling: bool,
    version: int = DECODE_VERSION,
    bit_depth: int | None = None,
) -> np.ndarray:
    """Return a crop of an image, resized to ``output_hw``: uint8 [channels, height, width].

    The crop box is rounded to integer pixels, then resized (bicubic or bilinear, with antialiasing). jpeg_scaling:
    decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop then still has at least ``output_hw`` pixels. version,
    bit_depth: as in ``decode_image``.
    Raises: UndecodableError, as ``decode_image``; any exception of ``choose_crop``.
    """
    with translate_errors():
        image = open_image(data, version)
        is_jpeg = isinstance(image, JpegImageFile)
        stored = None if is_jpeg else _load_pixels(image, channels, 1, version, bit_depth)
        orientation = read_orientation(image)
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
        with translate_errors():
            array = _decode_jpeg(data, image, channels, scale)
    else:
        array = np.asarray(stored)
    columns = pixel_slice(left, right, scale, array.shape[1])
    rows = pixel_slice(top, bottom, scale, array.shape[0])
    pixels = _resize(array[rows, columns], stored_hw, interpolation)
    if transposed:
        pixels = pixels.transpose(-1, -2)
    flipped_axes = [axis for axis, is_flipped in ((-1, mirrored != flipped), (-2, inverted)) if is_flipped]
    if flipped_axes:
        pixels = pixels.flip(flipped_axes)
    return pixels.expand(channels, -1, -1).numpy()


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
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


def open_image(data: bytes, version: int = DECODE_VERSION) -> Image.Image:
    """Read the header of an image and check its size against Pillow's limit. Raises: UndecodableError."""
    if not data:
        raise UndecodableError("zero bytes")
    try:
        image = Image.open(io.BytesIO(drop_long_texts(data) if version > 1 else data), formats=_FORMATS)
    except UnidentifiedImageError:
        if (contents := describe_contents(data)) is None:
            raise
        raise UndecodableError(f"a TIFF of {contents} is not supported: convert it") from None
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UndecodableError(f"{image.width}x{image.height} pixels are more than Pillow's limit")
    return image


def read_orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """Return (transposed, mirrored, inverted) of an image; in formats other than JPEG only valid after loading."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return _UPRIGHT
    try:
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION, 1), _UPRIGHT)
    except Exception:  # noqa: BLE001 - damaged EXIF data does not make the pixels bad
        return _UPRIGHT


def _load_pixels(
    image: Image.Image, channels: int, scale: int, version: int = DECODE_VERSION, bit_depth: int | None = None
) -> Image.Image:
    """Decode with Pillow, as stored, to mode L or RGB; for one channel only a JPEG's luminance is decoded."""
    size = (image.width // scale, image.height // scale) if scale > 1 else None
    image.draft("L" if channels == 1 else "RGB", size)
    stored_in_16_bits = _is_stored_in_16_bits(image)  # before ``load``, which may forget it
    if isinstance(image, TiffImageFile):
        silence_libtiff()
        if version > 1 and (misread := find_misread_property(image)):
            raise UndecodableError(f"{misread} in a TIFF are not supported: convert it to PNG")
    image.load()
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        if version == 1:
            return Image.fromarray(_upper_byte(image))
        return Image.fromarray(_to_8_bits(image, bit_depth, stored_in_16_bits=stored_in_16_bits))
    if image.mode not in _EIGHT_BIT:
        raise UndecodableError(f"pixels of mode {image.mode} are not supported, 8 or 16 bits per channel are")
    if version > 1 and stored_in_16_bits:
        _check_upper_bytes(image, bit_depth)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns unless a palette with transparency goes through RGBA
    return image.convert("L" if channels == 1 or image.mode in ("1", "L", "LA") else "RGB")


def _is_stored_in_16_bits(image: Image.Image) -> bool:
    """Whether the file has samples of 16 bits and no other range of values; only valid before ``load``."""
    args = [tile[3] for tile in getattr(image, "tile", ())]
    return any(";16" in str(arg) or (image.format == "PPM" and arg[-1] == _MAX_UINT16) for arg in args)


def _upper_byte(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) >> 8).astype(np.uint8)


def _to_8_bits(image: Image.Image, bit_depth: int | None, *, stored_in_16_bits: bool) -> np.ndarray:
    """Return the upper 8 of the bits that a grey image of more than 8 uses: uint8 [h, w]. Raises: UndecodableError.

    A TIFF states its bits (tag 258) and whether 0 is white (tag 262); a PGM its range, to which Pillow scales. 16 bits
    of any format are also the container of 10 to 14 bits of a sensor, which no header states: see ``bit_depth``. Values
    above a stated bit depth, such as 65535 for no data, are white.
    """
    values, used_bits = np.asarray(image), _CONTAINER_BITS
    if stored_in_16_bits:
        _check_bit_depth(values, bit_depth)
        used_bits = bit_depth or _CONTAINER_BITS
        values = np.minimum(values, (1 << used_bits) - 1)
    elif isinstance(image, TiffImageFile):
        used_bits = count_bits(image)
    grey = (values >> (used_bits - 8)).astype(np.uint8)
    return 255 - grey if isinstance(image, TiffImageFile) and is_white_zero(image) else grey


def _check_upper_bytes(image: Image.Image, bit_depth: int | None) -> None:
    """Check colours of 16 bits per channel, of which Pillow returns the upper 8. Raises: UndecodableError."""
    if bit_depth not in (None, _CONTAINER_BITS):
        raise UndecodableError(
            f"colours of 16 bits per channel, of which {bit_depth} are used, are not supported: convert them to 8"
        )
    has_alpha = image.mode in ("RGBA", "RGBa", "RGBX", "LA")
    _check_bit_depth(np.asarray(image)[..., : -1 if has_alpha else None].astype(np.uint16) << 8, bit_depth)


def _check_bit_depth(values: np.ndarray, bit_depth: int | None) -> None:
    """Check the values of an image stored in 16 bits, but for a few, such as no data. Raises: UndecodableError.

    A dark image of 16 bits cannot be told from an image of 12, so the image alone does not decide.
    """
    if bit_depth is not None:
        if np.count_nonzero(values >> bit_depth) > values.size / 2:
            raise UndecodableError(
                f"most of its pixels are above the bit depth of {bit_depth} that the data set states"
            )
    elif values.any() and np.count_nonzero(values >> _SUSPICIOUS_BITS) < _FEW * values.size:
        used = int(np.percentile(values, 100 * (1 - _FEW), method="lower")) or int(values.max())
        raise UndecodableError(
            f"its pixels are stored in 16 bits and use about {used.bit_length()}: state how many the data set uses (16 if "
            f"the image is only dark) with {BIT_DEPTH_OPTION}"
        )


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


def pixel_slice(start: float, stop: float, scale: int, size: int) -> slice:
    """Return the pixels from start to stop at 1/scale; both ends round half up, which keeps the width."""
    first = min(math.floor(start / scale + 0.5), size - 1)
    return slice(first, max(first + 1, math.floor(stop / scale + 0.5)))


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Resize uint8 [h, w] or [h, w, C] to uint8 [min(C, 3), *size]."""
    if not array.flags.writeable:  # Pillow's own memory, of which PyTorch warns
        array = array.copy()
    planes = torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, size, mode=interpolation, antialias=True)[0, :3]
