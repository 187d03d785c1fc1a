"""Re-encoding of images, and images that do not decode."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import decode_image
from foveal.data.pack import pack_folder
from foveal.data.pack.encode import EncodedSample, SkippedSample, compute_pixel_stats, encode_sample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackSample
from foveal.errors import DataError


def smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return an image with small compression losses: greener to the right, redder downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([y, x, 255 - x], axis=2).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pack(data: bytes, field: str | None = "jpg", with_moments: bool = False, **options: Any) -> EncodedSample:
    sample = PackSample("k", field, 3, lambda: data, "there")
    encoded = encode_sample(sample, PackOptions.from_dict(options, "pack"), with_moments)
    assert isinstance(encoded, EncodedSample)
    return encoded


def open_image(sample: EncodedSample) -> Image.Image:
    return Image.open(io.BytesIO(sample.data))


def test_without_options_bytes_are_not_looked_at() -> None:
    assert pack(b"not an image").data == b"not an image"


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (45, 30)), ((60, 91), (30, 46)), ((31, 1000), (30, 968))])
def test_the_shorter_side_gets_the_length(size: tuple[int, int], expected: tuple[int, int]) -> None:
    sample = pack(encode(smooth(*size), "PNG"), "png", resize=30)
    assert open_image(sample).size == expected
    smaller = np.asarray(smooth(*expected), dtype=float)
    assert np.abs(np.asarray(open_image(sample), dtype=float) - smaller).max() < 10


@pytest.mark.parametrize(
    "options", [{"resize": 60}, {"resize": 200}, {"format": "jpg"}, {"format": "jpg", "resize": 60}]
)
def test_what_is_already_so_keeps_its_bytes(options: dict[str, Any]) -> None:
    data = encode(smooth(90, 60), "JPEG", quality=95)
    assert pack(data, **options).data == data


def test_a_quality_is_for_all() -> None:
    data = encode(smooth(90, 60), "JPEG", quality=95)
    assert len(pack(data, quality=30).data) < len(data)
    png = encode(smooth(90, 60), "PNG")
    assert pack(png, "png", quality=30).data == png


@pytest.mark.parametrize(("field", "kind"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_keep_colours_and_grey(field: str, kind: str, mode: str) -> None:
    picture = smooth(40, 30, mode)
    sample = pack(encode(picture, "BMP"), "bmp", format=field, quality=None if field == "png" else 95)
    assert (sample.field, open_image(sample).format) == (field, kind)
    assert open_image(sample).mode == ("RGB" if field == "webp" else mode)  # WebP has no grey
    difference = np.asarray(open_image(sample).convert("RGB"), dtype=float) - np.asarray(
        picture.convert("RGB"), dtype=float
    )
    assert np.abs(difference).mean() < 3


def test_other_formats_become_png_when_they_must_change() -> None:
    sample = pack(encode(smooth(40, 30), "TIFF"), "tif", resize=10)
    assert (sample.field, open_image(sample).size) == ("png", (13, 10))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{"format": "png"}, {"resize": 500}])
def test_orientation_is_applied_once(orientation: int, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(smooth(40, 20), "JPEG", quality=95, exif=exif)
    sample = pack(data, **options)
    assert open_image(sample).getexif().get(0x0112, 1) == 1
    assert (sample.data == data) == (orientation == 1 and options == {"resize": 500})
    before, after = (np.asarray(decode_image(image, 3), dtype=float) for image in (data, sample.data))
    assert before.shape == after.shape
    assert np.abs(before - after).mean() < 3


def test_a_profile_stays_and_that_of_other_colours_does_not() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = pack(encode(smooth(40, 30), "JPEG", icc_profile=profile), resize=10)
    assert open_image(rgb).info["icc_profile"] == profile
    cmyk = pack(encode(smooth(40, 30, "CMYK"), "JPEG", icc_profile=b"of CMYK"), resize=100)
    assert "icc_profile" not in open_image(cmyk).info
    assert open_image(cmyk).mode == "RGB"


def test_notes_on_an_image_are_dropped() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    sample = pack(encode(smooth(40, 30), "JPEG", exif=exif, comment=b"a secret"), resize=10)
    assert b"secret" not in sample.data


def test_the_kind_is_that_of_the_bytes_if_nobody_says() -> None:
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm", "GIF": "gif"}
    for kind, field in kinds.items():
        data = encode(smooth(8, 8), kind)
        assert (pack(data, None).field, pack(data, None).data) == (field, data)
    multi_picture = encode(smooth(8, 8), "MPO", save_all=True, append_images=[smooth(8, 8)])
    assert Image.open(io.BytesIO(multi_picture)).format == "MPO"
    assert pack(multi_picture, None).field == "jpg"
    assert pack(encode(smooth(8, 8), "GIF"), None, resize=4).field == "png"
    with pytest.raises(DataError, match=r"there does not decode \(no image in one of the formats JPEG, .*\)"):
        pack(b"no image", None)


def test_statistics_are_those_of_the_pixels_that_are_written() -> None:
    images = [smooth(40, 30), Image.new("L", (8, 8), 51)]
    samples = [pack(encode(image, "PNG"), "png", with_moments=True, resize=4) for image in images]
    pixels = [np.asarray(open_image(sample).convert("RGB")).reshape(-1, 3) / 255 for sample in samples]
    mean = np.mean([image.mean(axis=0) for image in pixels], axis=0)
    variance = np.mean([(image**2).mean(axis=0) for image in pixels], axis=0) - mean**2
    stats = compute_pixel_stats([sample.moments for sample in samples if sample.moments])
    assert stats[0] == pytest.approx(tuple(mean), rel=1e-12)
    assert stats[1] == pytest.approx(tuple(np.sqrt(variance)), rel=1e-9)


@pytest.mark.parametrize("options", [{"resize": 8}, {"format": "jpg"}, {"quality": 80}])
def test_an_image_that_must_be_decoded_and_cannot_be_is_named(options: dict[str, Any]) -> None:
    cut = encode(smooth(90, 60), "JPEG")[:-200]
    with pytest.raises(DataError, match=r"there does not decode \(.*truncated.*\): .* --skip-bad"):
        pack(cut, **options)
    bad = encode_sample(
        PackSample("k", "jpg", 0, lambda: cut, "there"),
        PackOptions.from_dict(options | {"skip_bad": True}, "pack"),
        False,
    )
    assert isinstance(bad, SkippedSample) and bad.location == "there" and "truncated" in bad.reason


def test_an_unstated_bit_depth_is_asked_with_the_option_of_the_packer() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(stream, "PNG")
    with pytest.raises(DataError, match=r"in 16 bits and use about 12: .* with --bit-depth BITS\)") as caught:
        pack(stream.getvalue(), "png", with_moments=True)
    assert "foveal data index" not in str(caught.value), "nothing is packed yet"
    assert pack(stream.getvalue(), "png", with_moments=True, bit_depth=12).moments is not None


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with five good and two truncated images of one class."""
    (tmp_path / "mixed" / "a").mkdir(parents=True)
    for number in range(7):
        data = encode(smooth(40 + number, 30), "JPEG")
        (tmp_path / "mixed" / "a" / f"{number}.jpg").write_bytes(data[:-99] if number in (2, 5) else data)
    return tmp_path / "mixed"


def test_bad_images_are_left_out_and_listed(tmp_path: Path, mixed: Path) -> None:
    pack_folder(mixed, tmp_path / "out", val_fraction=0, skip_bad=True)
    dataset = Dataset.open(DataConfig.from_dict({"path": str(tmp_path / "out"), "image_size": 8}, "the test"))
    index = dataset.shard_index("train", 0)
    assert sorted(index.key(row).split("_")[1] for row in range(len(index))) == ["0", "1", "3", "4", "6"]
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == [str(mixed / "a" / f"{at}.jpg") for at in (2, 5)]
    assert all("truncated" in line for line in lines)


def test_if_nothing_decodes_nothing_is_written(tmp_path: Path, mixed: Path) -> None:
    for file in (mixed / "a").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of the split 'train' decodes: 7 were tried"):
        pack_folder(mixed, tmp_path / "out", val_fraction=0, skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, mixed: Path) -> None:
    (mixed / "a" / "2.jpg").unlink()
    (mixed / "a" / "2.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"a/2.jpg cannot be read \(.*No such file"):
        pack_folder(mixed, tmp_path / "out")


def test_classes_that_are_called_like_numbers_keep_their_images(tmp_path: Path, read_tar: Callable) -> None:
    """Folder '1' is the first class, with label 0; label 1 is not the class with the name 1."""
    for name in ("1", "2", "10"):
        (tmp_path / "in" / name).mkdir(parents=True)
        smooth(4, 4).save(tmp_path / "in" / name / f"of{name}.png")
    pack_folder(tmp_path / "in", tmp_path / "out", val_fraction=0)
    dataset = Dataset.open(DataConfig.from_dict({"path": str(tmp_path / "out"), "image_size": 8}, "the test"))
    index = dataset.shard_index("train", 0)
    classes = dataset.classes or ()
    assert classes == ("1", "10", "2")
    for row, sample in enumerate(read_tar(tmp_path / "out" / "train-000000.tar")):
        assert sample["__key__"].endswith(f"of{classes[index.labels[row]]}")


def test_a_test_folder_is_a_split_and_no_class(tmp_path: Path) -> None:
    for split, names in {"train": "ab", "test": "b"}.items():
        for name in names:
            (tmp_path / "in" / split / name).mkdir(parents=True)
            smooth(4, 4).save(tmp_path / "in" / split / name / "0.png")
    pack_folder(tmp_path / "in", tmp_path / "out", name="mine")
    dataset = Dataset.open(DataConfig.from_dict({"path": str(tmp_path / "out"), "image_size": 8}, "the test"))
    assert dataset.manifest.name == "mine"
    assert {split: dataset.class_counts(split).tolist() for split in dataset.manifest.splits} == {
        "train": [1, 1],
        "test": [0, 1],
    }
