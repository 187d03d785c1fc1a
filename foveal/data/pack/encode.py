"""Encoding of an image for a shard: unchanged bytes, or re-encoded pixels."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveal.data.image.decode import BIT_DEPTH_OPTION, UndecodableError, decode_image, read_image_size
from foveal.data.image.targets import LabelSurvey
from foveal.data.pack.label_member import ImageSize, LabelMember
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackSample, PixelStats, SampleLabel
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

PixelMoments = tuple[np.ndarray, np.ndarray]  # mean and mean square of RGB pixels in [0, 1]: float64 [3] each


@dataclass(frozen=True)
class EncodedSample:
    """A sample as stored in the shard. label_data: bytes of its label member.

    moments: of its pixels, and size: width and height, if requested.
    """

    key: str
    field: str
    label: SampleLabel
    data: bytes
    moments: PixelMoments | None = None
    label_data: bytes | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class SkippedSample:
    """An image that is skipped because it, or its label, does not decode."""

    location: str
    reason: str


def encode_sample(
    sample: PackSample,
    options: PackOptions,
    with_moments: bool,
    label_member: LabelMember | None = None,
    label_survey: LabelSurvey | None = None,
) -> EncodedSample | SkippedSample:
    """Read a sample, decode it if options or moments need its pixels, and re-encode it if the options change it.

    A label member is read, checked and counted in ``label_survey``, and resized with its image.
    Raises: DataError with the image's location if it cannot be read, or does not decode and ``skip_bad`` is off, and
    if a label is wrong.
    """
    label_data = None
    try:
        data = sample.read_bytes()
        if label_member is not None and label_survey is not None:
            size = read_image_size(data)
            label_data = read_label_data(sample, size, label_member, label_survey)
        if not (with_moments or options.may_reencode or options.skip_bad):
            return EncodedSample(
                sample.key, sample.field or _detect_field(data), sample.label, data, label_data=label_data
            )
        image = decode_image(data, 3, bit_depth=options.bit_depth)
        if options.may_reencode:
            before = image.size
            field, data, image = _encode_image(data, image, options)
            if label_data is not None and label_member is not None and image.size != before:
                label_data = label_member.resize(label_data, before, image.size)
        else:
            field = sample.field or _detect_field(data)
    except OSError as error:
        raise DataError(f"{sample.location} cannot be read ({error})") from None
    except UndecodableError as error:
        reason = str(error).replace(BIT_DEPTH_OPTION, "--bit-depth BITS")  # there is nothing yet to index
        if options.skip_bad:
            return SkippedSample(sample.location, reason)
        raise DataError(
            f"{sample.location} does not decode ({reason}): repair or remove it, or leave out all such with --skip-bad"
        ) from None
    moments, size = (_compute_moments(image), image.size) if with_moments else (None, None)
    return EncodedSample(sample.key, field, sample.label, data, moments, label_data, size)


def read_label_data(sample: PackSample, size: ImageSize, label_member: LabelMember, survey: LabelSurvey) -> bytes:
    """Return the bytes of a sample's label, which was read as training does and counted in ``survey``.

    Raises: OSError; UndecodableError; DataError if it is no valid label of an image of this size.
    """
    assert sample.read_label is not None
    data = sample.read_label(size)
    try:
        survey.add(data, size, sample.location)
    except DataError as error:
        raise DataError(label_member.explain(str(error))) from None
    return data


def compute_pixel_stats(moments: list[PixelMoments]) -> PixelStats:
    """Return mean and standard deviation of RGB pixels in [0, 1] over images; every image has the same weight."""
    mean = np.mean([image_mean for image_mean, _ in moments], axis=0)
    mean_square = np.mean([image_mean_square for _, image_mean_square in moments], axis=0)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return tuple(map(float, mean)), tuple(map(float, std))


def _compute_moments(image: Image.Image) -> PixelMoments:
    """Compute the moments from a histogram of the 256 levels: exact, without a float per pixel."""
    counts = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
    return counts @ _LEVELS, counts @ _LEVELS**2


def _detect_field(data: bytes) -> str:
    """Return the member name of an image without a known suffix, by its header. Raises: UndecodableError."""
    try:
        return _FIELDS[_image_format(Image.open(io.BytesIO(data), formats=tuple(_FIELDS)))]
    except Exception:  # noqa: BLE001 - Pillow's readers raise OSError, SyntaxError, struct.error, EOFError, ...
        raise UndecodableError(f"no image in one of the formats {', '.join(_FIELDS)}") from None


def _encode_image(data: bytes, image: Image.Image, options: PackOptions) -> tuple[str, bytes, Image.Image]:
    """Return field, bytes and RGB pixels of an image under the options; an image that already fits keeps its bytes.

    A grey image stays grey, the colour profile is kept, the orientation is applied, other metadata is dropped.
    """
    source = Image.open(io.BytesIO(data))
    keeps_mode = source.mode in ("L", "RGB")
    source_field = _FIELDS.get(_image_format(source))
    field = options.format or (source_field if source_field in _FORMATS else "png")
    resized = _shrink(image, options.resize)
    lossy = field != "png"
    unchanged = field == source_field and resized is image and not (lossy and options.quality)
    if unchanged and keeps_mode and _is_upright(source):
        return field, data, image
    grey = source.mode in ("1", "L", "LA") or source.mode.startswith("I")
    encoded = resized.convert("L") if grey else resized.copy()
    encoded.info = {}
    icc_profile = source.info.get("icc_profile") if keeps_mode else None
    quality = {"quality": options.quality or _QUALITY} if lossy else {}
    stream = io.BytesIO()
    encoded.save(stream, _FORMATS[field], icc_profile=icc_profile, **quality)
    return field, stream.getvalue(), resized


def _image_format(image: Image.Image) -> str:
    """Return the file format; a JPEG followed by further images (MPO, from some cameras) is a JPEG."""
    return (image.format or "").replace("MPO", "JPEG")


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception:  # noqa: BLE001 - re-encoding drops damaged EXIF data
        return False


def _shrink(image: Image.Image, shorter_side: int | None) -> Image.Image:
    """Resize an image to a shorter side in pixels; return the same object if that would enlarge it."""
    if shorter_side is None or min(image.size) <= shorter_side:
        return image
    factor = shorter_side / min(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
