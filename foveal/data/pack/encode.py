"""What happens to the bytes of one image on its way into a shard."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveal.data.image.decode import Undecodable, decode
from foveal.data.pack.options import Recipe
from foveal.data.pack.source import Sample, Statistics
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

Moments = tuple[np.ndarray, np.ndarray]  # mean and mean square of RGB pixels in [0, 1], float64 [3] each


@dataclass(frozen=True)
class Ready:
    """A sample as it will stand in the shard. moments: of its pixels, if they were asked for."""

    key: str
    field: str
    label: int
    data: bytes
    moments: Moments | None = None


@dataclass(frozen=True)
class Bad:
    """An image that is left out because it does not decode."""

    where: str
    reason: str


def prepare(sample: Sample, recipe: Recipe, measured: bool) -> Ready | Bad:
    """Read a sample, decode it if the recipe or the statistics need its pixels, and encode it anew if it must change.

    Errors: DataError that names the image if it cannot be read, or does not decode and ``skip_bad`` is off.
    """
    try:
        data = sample.read()
    except OSError as error:
        raise DataError(f"{sample.where} cannot be read ({error})") from None
    try:
        if not (measured or recipe.reencodes or recipe.skip_bad):
            return Ready(sample.key, sample.field or _field(data), sample.label, data)
        image = decode(data, 3)
        if recipe.reencodes:
            field, data, image = _encoded(data, image, recipe)
        else:
            field = sample.field or _field(data)
    except Undecodable as error:
        if recipe.skip_bad:
            return Bad(sample.where, str(error))
        raise DataError(
            f"{sample.where} does not decode ({error}): repair or remove it, or leave out all such with --skip-bad"
        ) from None
    return Ready(sample.key, field, sample.label, data, _moments(image) if measured else None)


def statistics_of(moments: list[Moments]) -> Statistics:
    """Mean and standard deviation of RGB pixels in [0, 1] over images, every image with the same weight."""
    mean = np.mean([first for first, _ in moments], axis=0)
    std = np.sqrt(np.maximum(np.mean([second for _, second in moments], axis=0) - mean**2, 0))
    return tuple(map(float, mean)), tuple(map(float, std))


def _moments(image: Image.Image) -> Moments:
    """From counts of the 256 levels: exact, and no float per pixel."""
    counts = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
    return counts @ _LEVELS, counts @ _LEVELS**2


def _field(data: bytes) -> str:
    """The kind of member that an image without a known suffix becomes: what its first bytes say."""
    try:
        return _FIELDS[_kind(Image.open(io.BytesIO(data), formats=tuple(_FIELDS)))]
    except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        raise Undecodable(f"no image in one of the formats {', '.join(_FIELDS)}") from None


def _encoded(data: bytes, image: Image.Image, recipe: Recipe) -> tuple[str, bytes, Image.Image]:
    """Field, bytes and RGB pixels of an image made as the recipe wants it; what is so already keeps its bytes.

    A grey image stays grey, a colour profile stays with it, orientation is applied, other notes are dropped.
    """
    before = Image.open(io.BytesIO(data))
    plain = before.mode in ("L", "RGB")
    came = _FIELDS.get(_kind(before))
    field = recipe.format or (came if came in _FORMATS else "png")
    shrunk = _shrunk(image, recipe.resize)
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


def _kind(image: Image.Image) -> str:
    """The format of a file; a JPEG that is followed by others (MPO, as some cameras write) is a JPEG."""
    return (image.format or "").replace("MPO", "JPEG")


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # noqa: BLE001 - notes that cannot be read are better left behind
        return False


def _shrunk(image: Image.Image, shorter: int | None) -> Image.Image:
    """The image with this shorter side, or itself if that would enlarge it."""
    if shorter is None or min(image.size) <= shorter:
        return image
    factor = shorter / min(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
