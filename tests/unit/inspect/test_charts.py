"""Pictures of an evaluation: with any names, of one class and of a thousand, readable on any page, in words too."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from foveal.inspect.calibration import draw_calibration
from foveal.inspect.chart import add_axes, new_figure, plain_text, set_ticks, short_name, to_image, write_text
from foveal.inspect.class_results import draw_class_results
from foveal.inspect.confusion import draw_confusion
from foveal.inspect.mistakes import draw_captioned_images
from foveal.inspect.picture import Picture

AWKWARD = ("<b>ä", "$x^2$ and $y$", "a\nb", "道路", "x" * 300, "", "\\frac{", "\x07", "'\"&", "50 %")
PAPER = 0  # opacity


def confusion_of(counts: Any, classes: Any, **further: Any) -> Picture:
    support = np.array(counts).sum(axis=1).tolist()
    words: dict[str, Any] = {"num_classes": len(classes), "unit": "images", "subject": "9 images of val"} | further
    return draw_confusion(counts, classes, words.pop("pairs", ()), support=support, **words)


def rows_of(classes: Any, **further: Any) -> list[dict[str, Any]]:
    return [{"class": name, "support": 7, "recall": 0.5, "precision": None} | further for name in classes]


def test_paper_is_transparent_and_ink_is_the_same_on_any_page() -> None:
    figure = new_figure(3, 2)
    write_text(add_axes(figure, title="a title"), 0.5, 0.5, "a text")
    pixels = np.asarray(to_image(figure))
    assert pixels.shape == (300, 450, 4)
    assert pixels[2, 2, 3] == PAPER
    inked = pixels[pixels[:, :, 3] == 255]
    assert (inked == (0x76, 0x76, 0x76, 255)).all(axis=1).mean() > 0.9


def test_names_are_drawn_as_they_are() -> None:
    """Dollars are no mathematics, which an odd backslash would make an error, and a missing glyph is no warning."""
    figure = new_figure(4, 4)
    axes = add_axes(figure, title=AWKWARD[1])
    set_ticks(axes, "x", range(len(AWKWARD)), AWKWARD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_image(figure)
    assert plain_text("$5 and $6") == "\\$5 and \\$6"
    assert short_name("a\n b") == "a b"
    assert len(short_name("x" * 300)) == 28
    assert short_name("abcdefghij", 5) == "ab…ij"


def test_a_confusion_matrix_says_what_is_confused() -> None:
    pairs = [{"class": "cat", "predicted": "dog", "count": 3, "support": 10}]
    picture = confusion_of([[7, 3], [0, 5]], ("cat", "dog"), pairs=pairs)
    assert picture.title == "Confusion matrix"
    assert "Most confused: cat taken for dog, 3 of 10 images." in picture.description
    assert "All images are predicted correctly" in confusion_of([[7, 0], [0, 5]], ("cat", "dog")).description


@pytest.mark.parametrize(
    ("counts", "classes"),
    [
        pytest.param([[0]], ("one",), id="one class without images"),
        pytest.param([[3]], ("one",), id="one class"),
        pytest.param([[0, 0], [0, 0]], ("a", "b"), id="nothing counted"),
        pytest.param(np.eye(10, dtype=int).tolist(), AWKWARD, id="awkward names"),
        pytest.param(np.arange(1600).reshape(40, 40).tolist(), [f"class {n}" for n in range(40)], id="40 classes"),
        pytest.param([[5_000_000, 20_000], [1, 7]], ("a", "b"), id="pixels"),
    ],
)
def test_every_confusion_matrix_draws(counts: Any, classes: Any) -> None:
    image = confusion_of(counts, classes).image
    assert image.mode == "RGBA"
    assert max(image.size) < 2500
    assert len(np.unique(np.asarray(image)[:, :, 3])) > 1, "nothing was drawn"


def test_mistakes_are_told_from_hits_by_their_colour() -> None:
    """A hit is blue and a mistake orange, however few there are."""

    def has(picture: Picture, colour: tuple[int, int, int]) -> bool:
        pixels = np.asarray(picture.image).astype(int)[:, : picture.image.width // 2, :3]  # without the scales
        return bool((np.abs(pixels - colour).sum(axis=2) < 12).any())

    dark_blue, dark_orange = (0x00, 0x43, 0x6B), (0x8A, 0x3A, 0x00)
    perfect, poor = confusion_of([[9, 0], [0, 9]], "ab"), confusion_of([[999, 1], [0, 999]], "ab")
    assert has(perfect, dark_blue) and not has(perfect, dark_orange)
    assert has(poor, dark_orange)


def test_the_worst_classes_come_first() -> None:
    rows = rows_of("abc")
    rows[1] |= {"recall": 0.25}
    rows[2] |= {"recall": None, "support": 0}
    picture = draw_class_results(rows, unit="images", subject="9 images of val")
    assert picture is not None
    assert (
        "Mean recall 37.5 %; worst: b 25.0 %, a 50.0 %. Classes left out, for want of images: 1." in picture.description
    )


@pytest.mark.parametrize("classes", [AWKWARD, ["one"], [f"n{number:08d}" for number in range(1000)]])
def test_any_number_of_classes_draws(classes: Any) -> None:
    picture = draw_class_results(rows_of(classes), unit="images", subject="images")
    assert picture is not None
    assert max(picture.image.size) < 2000
    assert ("30 worst of 1,000 classes" in picture.description) == (len(classes) == 1000)


def test_without_numbers_there_is_no_picture_of_classes() -> None:
    assert draw_class_results([], unit="images", subject="") is None
    assert draw_class_results(rows_of("ab", recall=None), unit="images", subject="") is None
    assert draw_class_results([{"class": "a", "support": 1}], unit="images", subject="") is None


def test_calibration_says_whether_it_is_overconfident() -> None:
    empty = {"count": 0, "accuracy": None, "confidence": None}
    bins = [empty] * 9 + [{"count": 10, "accuracy": 0.7, "confidence": 0.95}]
    picture = draw_calibration(bins, 0.25, subject="10 images")
    assert picture is not None
    assert "Expected calibration error 25.0 %; on average 25.0 points more confident than right." in picture.description
    assert draw_calibration([empty] * 10, None, subject="") is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 300, 40), (3, 2, 900)])
def test_captions_stay_below_their_images(shape: tuple[int, ...]) -> None:
    images = torch.full((7, *shape), 200, dtype=torch.uint8)
    captions = [(name, f"taken for {name}", "97.0 %") for name in AWKWARD[:7]]
    sheet = draw_captioned_images(images, captions)
    assert sheet.width < 1100
    pixels = np.asarray(sheet)
    assert pixels[-1, -1, 3] == PAPER
    assert (pixels == 200).any() and (pixels[:, :, 0] == 0x76).any()
