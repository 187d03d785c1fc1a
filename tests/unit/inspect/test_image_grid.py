"""The sheet of images: sizes that people can look at, and text that stays on it."""

import numpy as np
import torch

from foveal.inspect.image_grid import GAP, MARGIN, MAX_SHEET_SIDE, MIN_IMAGE_SIDE, draw_image_grid, wrap_text


def images(number: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.arange(number, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, height, width) + 100


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    sheet = draw_image_grid({"a": images(2, 12, 20, 1), "b": images(2, 12, 20, 1)})
    width, height = 20 * 7, 12 * 7  # the first multiple from 128 on
    assert sheet.width == max(2 * MIN_IMAGE_SIDE, 2 * (width + GAP) - GAP) + 2 * MARGIN
    pixels = np.asarray(sheet)
    assert (pixels[-MARGIN - GAP - height : -MARGIN - GAP, MARGIN : MARGIN + width] == 101).all()


def test_a_sheet_has_the_rows_that_fit_and_wide_images_are_reduced() -> None:
    many = draw_image_grid({"a": images(20, 300, 300)})
    assert MAX_SHEET_SIDE - 300 < many.height < MAX_SHEET_SIDE + 100
    wide = draw_image_grid(dict.fromkeys("abcde", images(1, 400, 1000)))
    assert MAX_SHEET_SIDE - 5 < wide.width <= MAX_SHEET_SIDE + 2 * MARGIN
    assert draw_image_grid({"a": images(1, 2000, 100)}).height < MAX_SHEET_SIDE + 100


def test_text_is_wrapped_and_makes_room() -> None:
    columns = {"a": images(1, 128, 128)}
    plain, full = (
        draw_image_grid(columns, title=title, legend=legend, notes=notes)
        for title, legend, notes in (("", [], []), ("word " * 40, [("道路", (1, 2, 3))] * 9, ["note " * 40]))
    )
    assert full.height > plain.height + 100 and full.width == plain.width
    assert wrap_text("one two", 1) == ["one", "two"]
    assert wrap_text("", 100) == []
    assert wrap_text("né", 100) == ["n?"]
