"""The comparison sees what differs: values, shapes, names, NaN, class names; and images come from where they should."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from foveal.convert.compare import TOLERANCE, Difference, Reopened, check_reopened, measure_differences
from foveal.convert.images import MAX_IMAGES, read_comparison_images
from foveal.errors import DataError, ExportError
from foveal.inference.image_transform import ImageTransform

PIXELS = torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2)
TRANSFORM = ImageTransform((16, 16), 3, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic", jpeg_scaling=True)


def reopened(shift: float, tolerance: float | None = TOLERANCE) -> Reopened:
    """A model whose second image is shifted, so that a batch of one does not show it."""

    def run(pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": pixels.float().mean(dim=(1, 2, 3))[:, None] + 1}

    def shifted(pixels: Tensor) -> dict[str, Tensor]:
        logits = run(pixels)["logits"]
        logits[1:2] += shift
        return {"logits": logits}

    return Reopened("a library", run, shifted, (), "", tolerance)


def test_the_largest_difference_of_any_batch_is_reported() -> None:
    # Means are 5.5 + 1 to 41.5 + 1; the largest value of a batch of three is 30.5.
    assert check_reopened(reopened(0.0), PIXELS, ()) == [Difference("logits", 0.0, 0.0)]
    (difference,) = check_reopened(reopened(2.0**-12), PIXELS, ())
    assert difference.absolute == 2.0**-12
    assert difference.relative == pytest.approx(2.0**-12 / 30.5)


def test_more_than_the_tolerance_is_an_error_unless_weights_were_rounded() -> None:
    with pytest.raises(ExportError, match=r"a library gives other logits than foveal: they differ by 5\.0e-01"):
        check_reopened(reopened(0.5), PIXELS, ())
    assert check_reopened(reopened(0.5, tolerance=None), PIXELS, ())[0].absolute == 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_a_difference(value: float) -> None:
    (difference,) = measure_differences({"a": torch.ones(2)}, {"a": torch.tensor([1.0, value])})
    assert difference.relative == torch.inf


def test_a_difference_from_zero_is_infinite() -> None:
    assert measure_differences({"a": torch.zeros(1)}, {"a": torch.zeros(1)})[0].relative == 0
    assert measure_differences({"a": torch.zeros(1)}, {"a": torch.full((1,), 1e-9)})[0].relative == torch.inf


@pytest.mark.parametrize("other", [{"b": torch.ones(2)}, {"a": torch.ones(1)}, {}])
def test_other_names_and_shapes_are_refused(other: dict[str, Tensor]) -> None:
    with pytest.raises(ExportError, match="has outputs"):
        measure_differences({"a": torch.ones(2)}, other)


def test_other_class_names_are_refused() -> None:
    with pytest.raises(ExportError, match="other class names"):
        check_reopened(reopened(0.0), PIXELS, ("cat",))


def test_photographs_come_along_and_two_become_four() -> None:
    images = read_comparison_images(TRANSFORM, None)
    assert [file.name for file in images.files] == ["china.jpg", "flower.jpg"]
    assert images.pixels.shape == (MAX_IMAGES, 3, 16, 16)
    assert images.pixels[2].equal(images.pixels[0].flip(-1))
    assert len({row.numpy().tobytes() for row in images.pixels}) == MAX_IMAGES


def test_images_of_a_folder_are_taken_and_what_is_none_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    Image.new("RGB", (20, 30), (1, 2, 3)).save(tmp_path / "b.png")
    images = read_comparison_images(TRANSFORM, tmp_path)
    assert [file.name for file in images.files] == ["b.png"]
    assert images.pixels.shape[0] == MAX_IMAGES


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match="has no image that decodes"):
        read_comparison_images(TRANSFORM, tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        read_comparison_images(TRANSFORM, tmp_path / "a.txt")
