"""Decoding of masks: from the bytes of an image file to the class id of every pixel, as it was stored."""

import re

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from foveal.data.image.decode import (
    DECODE_VERSION,
    SIXTEEN_BIT,
    UndecodableError,
    open_image,
    pixel_slice,
    read_orientation,
    translate_errors,
)
from foveal.data.image.tiff import is_white_zero, silence_libtiff
from foveal.data.image.transforms import CropBox

_ID_MODES = {"1", "L", "P", "I", *SIXTEEN_BIT}


def decode_mask_crop(
    data: bytes, box: CropBox, flipped: bool, output_hw: tuple[int, int], version: int = DECODE_VERSION
) -> tuple[tuple[int, int], np.ndarray]:
    """Return (width, height) of a mask, and the ids of a crop, nearest-neighbour resized: int32 [height, width].

    ``output_hw`` is the size of the result. The ids are palette indices, or grey pixels of 1, 8 or 16 bits, as stored; the
    mask is turned upright like its image. version: the rules of reading (``data.decode_version``); those of 1 took the
    pixels that Pillow shows, which are not always those that were stored, and turned no mask.
    Raises: UndecodableError.
    """
    with translate_errors():
        image = open_image(data, version)
        scale = 1.0 if version == 1 else _find_id_scale(image)
        if image.format == "TIFF":
            silence_libtiff()
        image.load()
        if image.mode not in _ID_MODES:
            raise UndecodableError(
                f"pixels of mode {image.mode} are not class ids: one grey channel or a palette is needed"
            )
        array = np.asarray(image).astype(np.int32)
        if version > 1 and image.mode == "P":
            _check_palette(image, array)
        orientation = read_orientation(image)
    if version > 1:
        array = _turn_upright(np.rint(array * scale).astype(np.int32) if scale != 1 else array, orientation)
    left, top, right, bottom = box
    crop = array[pixel_slice(top, bottom, 1, array.shape[0]), pixel_slice(left, right, 1, array.shape[1])]
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(output_hw, crop.shape, strict=True))
    ids = crop[rows[:, None], columns[None, :]]
    return (array.shape[1], array.shape[0]), np.ascontiguousarray(ids[:, ::-1] if flipped else ids)


def _find_id_scale(image: Image.Image) -> float:
    """Return the factor from the pixels that Pillow will load to the ids that are stored; only valid before ``load``.

    Raises: UndecodableError for a format whose pixels are not the ids that were written.
    """
    if image.format == "JPEG":
        raise UndecodableError("a JPEG does not keep class ids: write masks as PNG")
    if (isinstance(image, TiffImageFile) and is_white_zero(image) and image.mode != "1") or (
        image.format == "PPM" and image.mode == "1"
    ):
        raise UndecodableError("a format in which 0 is white does not say which ids are meant: write masks as PNG")
    tiles = getattr(image, "tile", None)
    codec, args = (tiles[0][0], tiles[0][3]) if tiles else ("", "")
    rawmode, *further = args if isinstance(args, tuple) else (args,)
    if codec in ("ppm", "ppm_plain") and image.mode != "1" and further:
        return further[0] / (255 if image.mode == "L" else 65535)
    if few_bits := re.match(r"L;([24])", str(rawmode)):
        raise UndecodableError(
            f"grey of {few_bits[1]} bits may hold the ids or, from an optimizer, ids that were larger: write masks with 8"
        )
    return 1.0


def _check_palette(image: Image.Image, ids: np.ndarray) -> None:
    """Refuse indices into a palette of greys that are others than the indices: optimizers store grey ids so.

    Black and white are classes 0 and 1 either way. Raises: UndecodableError.
    """
    palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(ids[ids < len(palette)])
    colors = palette[used]
    is_grey = (colors == colors[:, :1]).all() and len(used) > 1
    is_black_and_white = np.array_equal(colors[:, 0], used * 255)
    if is_grey and not is_black_and_white and not np.array_equal(colors[:, 0], used):
        raise UndecodableError(
            f"a palette of greys may mean its indices ({_list_ids(used)}) or its greys ({_list_ids(colors[:, 0])}): write "
            f"masks as grey PNG of 8 bits"
        )


def _list_ids(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")


def _turn_upright(array: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transposed, mirrored, inverted = orientation
    upright = array.T if transposed else array
    return upright[:: -1 if inverted else 1, :: -1 if mirrored else 1]
