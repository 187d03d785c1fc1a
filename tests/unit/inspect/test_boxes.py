"""The grid of detections: frames at the boxes, unchanged pixels elsewhere."""

import numpy as np
import torch

from foveal.data.image.label_drawing import make_class_palette
from foveal.inspect.boxes import draw_box_grid
from foveal.inspect.image_grid import GAP, MARGIN

SIDE = 320


def test_frames_are_where_the_boxes_are() -> None:
    images, palette = torch.full((3, 1, SIDE, SIDE), 90, dtype=torch.uint8), make_class_palette(2).tolist()
    ground_truth = [np.array([[20, 60, 120, 160, 1.0]]), np.empty((0, 5)), np.array([[0, 0, SIDE, SIDE, 0.0]])]
    predicted = [np.empty((0, 6)), np.empty((0, 6)), np.array([[50, 80, 50, 80, 1, 0.5]])]
    sheet = np.asarray(draw_box_grid(images, ground_truth, predicted, ("car", "tree"), title="After step 7 of 9"))
    step = SIDE + GAP
    assert sheet.shape[1] == 2 * step - GAP + 2 * MARGIN
    pixels = sheet[-3 * step - MARGIN : -MARGIN, MARGIN:-MARGIN]
    first, second, third = (pixels[row * step : row * step + SIDE] for row in range(3))
    for pixel in ((159, 70), (100, 20), (100, 119)):
        assert first[pixel].tolist() == palette[1]
    assert (first[100, 30:110] == 90).all()
    assert (first[:, step:] == 90).all(), "no box was predicted"
    assert (second[:, :SIDE] == 90).all(), "the image has no boxes"
    assert third[SIDE - 1, SIDE - 1].tolist() == palette[0]
    assert third[80, step + 50].tolist() == palette[1], "a box of size 0 is a point with a label"
