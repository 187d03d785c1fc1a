"""The sheet of segmentations: what lies where, and in which colour."""

import numpy as np
import torch

from foveal.inspect.image_grid import GAP
from foveal.inspect.segmentation import GREY, draw_segmentation_grid, make_class_palette


def test_classes_have_colours_of_their_own() -> None:
    palette = make_class_palette(20).int()
    assert palette[:3].tolist() == make_class_palette(3).tolist()
    apart = (palette[:, None] - palette[None]).abs().sum(dim=2) + 1000 * torch.eye(20, dtype=torch.int32)
    assert apart.min() > 40


def test_a_row_is_the_image_its_mask_and_the_guess() -> None:
    images = torch.full((2, 1, 64, 80), 100, dtype=torch.uint8)
    truth, guess = torch.zeros(2, 64, 80, dtype=torch.int16), torch.ones(2, 64, 80, dtype=torch.int64)
    truth[:, :, 40:] = -1
    page = draw_segmentation_grid(images, truth, guess, ("sky", "道路"))
    pixels = np.asarray(page)
    assert page.width == 3 * 80 + 2 * GAP
    assert page.height > 2 * 64 + GAP
    covered = [np.round(0.6 * np.array(each) + 40) for each in [*make_class_palette(2).tolist(), [GREY] * 3]]
    for row in (10, 64 + GAP + 10):
        assert (pixels[row, 20] == 100).all()
        assert (pixels[row, 80 + GAP + 20] == covered[0]).all()
        assert (pixels[row, 80 + GAP + 60] == covered[2]).all()
        assert (pixels[row, 2 * (80 + GAP) + 20] == covered[1]).all()
    assert (pixels[-7, 3] == make_class_palette(2)[0].numpy()).all(), "and below, what the colours mean"
