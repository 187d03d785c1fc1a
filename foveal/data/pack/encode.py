"""What happens to the bytes of one image on its way into a shard."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveal.data.image.decode import UndecodableError, decode_image
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackSample, PixelStats
from foveal.errors import DataError

_FIELDS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "PPM": "ppm",
    "TIFF": "tif",
}
_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_QUALITY = 90
_ORIENTATION = 0x0112
_LEVELS = np.arange(256) / 255

PixelMoments = tuple[np.ndarray, np.ndarray]  # mean and mean square of RGB pixels in [0, 1], float64 [3] each


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it will stand in the shard. moments: of its pixels, if they were asked for."""

    key: str
    field: str
    label: int
    data: bytes
    moments: PixelMoments | None = None


@dataclass(frozen=True)
class SkippedSample:
    """An image that is left out because it does not decode."""

    location: str
    reason: str


def encode_sample(sample: PackSample, options: PackOptions, with_moments: bool) -> EncodedSample | SkippedSample:
    """Read a sample, decode it if the recipe or the statistics need its pixels, and encode it anew if it must change.

    Raises: DataError that names the image if it cannot be read, or does not decode and ``skip_bad`` is off.
    """
    try:
        data = sample.read_bytes()
    except OSError as error:
        raise DataError(f"{sample.location} cannot be read ({error})") from None
    try:
        if not (with_moments or options.may_reencode or options.skip_bad):
            return EncodedSample(sample.key, sample.field or _detect_field(data), sample.label, data)
        image = decode_image(data, 3)
        if options.may_reencode:
            field, data, image = _encode_image(data, image, options)
        else:
            field = sample.field or _detect_field(data)
    except UndecodableError as error:
        if options.skip_bad:
            return SkippedSample(sample.location, str(error))
        raise DataError(
            f"{sample.location} does not decode ({error}): repair or remove it, or leave out all such with --skip-bad"
        ) from None
    return EncodedSample(sample.key, field, sample.label, data, _compute_moments(image) if with_moments else None)


def compute_pixel_stats(moments: list[PixelMoments]) -> PixelStats:
    """Mean and standard deviation of RGB pixels in [0, 1] over images, every image with the same weight."""
    mean = np.mean([first for first, _ in moments], axis=0)
    std = np.sqrt(np.maximum(np.mean([second for _, second in moments], axis=0) - mean**2, 0))
    return tuple(map(float, mean)), tuple(map(float, std))


def _compute_moments(image: Image.Image) -> PixelMoments:
    """From counts of the 256 levels: exact, and no float per pixel."""
    counts = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
    return counts @ _LEVELS, counts @ _LEVELS**2


def _detect_field(data: bytes) -> str:
    """The kind of member that an image without a known suffix becomes: what its first bytes say."""
    try:
        return _FIELDS[_image_format(Image.open(io.BytesIO(data), formats=tuple(_FIELDS)))]
    except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        raise UndecodableError(f"no image in one of the formats {', '.join(_FIELDS)}") from None


def _encode_image(data: bytes, image: Image.Image, recipe: PackOptions) -> tuple[str, bytes, Image.Image]:
    """Field, bytes and RGB pixels of an image made as the recipe wants it; what is so already keeps its bytes.

    A grey image stays grey, a colour profile stays with it, orientation is applied, other notes are dropped.
    """
    before = Image.open(io.BytesIO(data))
    plain = before.mode in ("L", "RGB")
    came = _FIELDS.get(_image_format(before))
    field = recipe.format or (came if came in _FORMATS else "png")
    shrunk = _shrink(image, recipe.resize)
    lossy = field != "png"
    stays = field == came and shrunk is image and not (lossy and recipe.quality)
    if stays and plain and _is_upright(before):
        return field, data, image
    grey = before.mode in ("1", "L", "LA") or before.mode.startswith("I")
    picture = shrunk.convert("L") if grey else shrunk.copy()
    picture.info = {}
    options = {"quality": recipe.quality or _QUALITY} if lossy else {}
    stream = io.BytesIO()
    picture.save(stream, _FORMATS[field], icc_profile=before.info.get("icc_profile") if plain else None, **options)
    return field, stream.getvalue(), shrunk


def _image_format(image: Image.Image) -> str:
    """The format of a file; a JPEG that is followed by others (MPO, as some cameras write) is a JPEG."""
    return (image.format or "").replace("MPO", "JPEG")


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # noqa: BLE001 - notes that cannot be read are better left behind
        return False


def _shrink(image: Image.Image, shorter: int | None) -> Image.Image:
    """The image with this shorter side, or itself if that would enlarge it."""
    if shorter is None or min(image.size) <= shorter:
        return image
    factor = shorter / min(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
