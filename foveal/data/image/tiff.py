"""Tags of TIFF files that decide which pixels are meant, and libtiff's messages.

Source: TIFF 6.0, sections 4, 8 and 19.
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
from pathlib import Path

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # what it logs is an exception as well

_BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION, _PLANAR_CONFIGURATION, _COLOR_MAP, _SAMPLE_FORMAT = (
    258,
    262,
    284,
    320,
    339,
)
_SAMPLES_PER_PIXEL = 277
_WHITE_IS_ZERO, _PLANES, _SIGNED = 0, 2, 2
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}


def count_bits(image: TiffImageFile) -> int:
    """Return the bits per sample."""
    return int(np.max(image.tag_v2.get(_BITS_PER_SAMPLE, 1)))


def is_white_zero(image: TiffImageFile) -> bool:
    """Whether 0 is white. Pillow inverts such pixels of 8 bits or less, and leaves those of 16."""
    return image.tag_v2.get(_PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO


def find_misread_property(image: TiffImageFile) -> str | None:
    """Return what makes Pillow return other pixels than the file has, or None."""
    tags = image.tag_v2
    if image.mode == "L" and _SIGNED in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        return "signed pixels"
    if tags.get(_PLANAR_CONFIGURATION) == _PLANES and count_bits(image) > 8:
        return "planes of 16 bits"
    if image.mode == "P" and 0 < np.max(tags.get(_COLOR_MAP, 0)) < 256:  # the values are of 16 bits
        return "a colour map of 8 bits"
    return None


def describe_contents(data: bytes) -> str | None:
    """Return what samples a TIFF states that Pillow does not know; None for other files and damaged ones."""
    if not data.startswith((b"II*\0", b"MM\0*")):
        return None
    try:
        tags, stream = ImageFileDirectory_v2(data[:8]), io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        bits = sorted(set(np.atleast_1d(tags[_BITS_PER_SAMPLE]).tolist()))
        samples = int(tags.get(_SAMPLES_PER_PIXEL, 1))
        formats = _SAMPLE_FORMATS.get(int(np.max(tags.get(_SAMPLE_FORMAT, 1))), "unknown")
        return f"{samples} {formats} samples of {', '.join(map(str, bits))} bits per pixel (photometric interpretation {tags[_PHOTOMETRIC_INTERPRETATION]})"
    except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        return None


@functools.cache
def silence_libtiff() -> None:
    """Keep libtiff, which Pillow loads, from writing its warnings to stderr; an error is Pillow's exception as well."""
    with contextlib.suppress(OSError, AttributeError):  # a libtiff inside of Pillow, or another system's
        lines = Path("/proc/self/maps").read_text().splitlines()
        files = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/libtiff[^/]*\.so", line)}
        for file in files:
            library = ctypes.CDLL(file)
            library.TIFFSetWarningHandler(None)
            library.TIFFSetErrorHandler(None)
