"""The grid of segmentations: layout and colours."""

import numpy as np
import torch

from foveal.data.image.label_drawing import GREY, make_class_palette
from foveal.inspect.image_grid import GAP, MARGIN
from foveal.inspect.segmentation import draw_segmentation_grid


def test_classes_have_colours_of_their_own() -> None:
    palette = make_class_palette(20).int()
    assert palette[:3].tolist() == make_class_palette(3).tolist()
    distances = (palette[:, None] - palette[None]).abs().sum(dim=2) + 1000 * torch.eye(20, dtype=torch.int32)
    assert distances.min() > 40


def test_a_row_is_the_image_its_mask_and_the_guess() -> None:
    images = torch.full((2, 1, 128, 160), 100, dtype=torch.uint8)
    truth, predicted = torch.zeros(2, 128, 160, dtype=torch.int16), torch.ones(2, 128, 160, dtype=torch.int64)
    truth[:, :, 80:] = -1
    grid = draw_segmentation_grid(images, truth, predicted, ("sky", "道路"))
    pixels = np.asarray(grid)[:, MARGIN:]
    assert grid.width == 3 * 160 + 2 * GAP + 2 * MARGIN
    colours = [*make_class_palette(2).tolist(), [GREY] * 3]
    blended = [np.round(0.6 * np.array(colour) + 40) for colour in colours]
    top = int(np.flatnonzero((pixels[:, 20] == 100).all(axis=1))[0])
    for row in (top + 10, top + 128 + GAP + 10):
        assert (pixels[row, 20] == 100).all()
        assert (pixels[row, 160 + GAP + 20] == blended[0]).all()
        assert (pixels[row, 160 + GAP + 120] == blended[2]).all()
        assert (pixels[row, 2 * (160 + GAP) + 20] == blended[1]).all()
    legend = pixels[-MARGIN - 8].tolist()
    assert all(colour in legend for colour in colours), "the legend shows the colours, and grey for no class"
