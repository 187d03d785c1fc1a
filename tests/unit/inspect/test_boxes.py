"""The sheet of boxes: frames where the boxes are, and the image left alone elsewhere."""

import numpy as np

from foveal.inspect.boxes import GAP, box_sheet, colour_of

SIDE = 200


def test_frames_are_where_the_boxes_are() -> None:
    images = np.full((3, 1, SIDE, SIDE), 90, np.uint8)
    there = [np.array([[20, 60, 120, 160, 1.0]]), np.empty((0, 5)), np.array([[0, 0, SIDE, SIDE, 0.0]])]
    found = [np.empty((0, 6)), np.array([[50, 50, 50, 50, 0, 0.5]]), np.empty((0, 6))]
    pixels = np.asarray(box_sheet(images, there, found, ("car", "tree")))
    step = SIDE + GAP
    assert pixels.shape == (2 * step - GAP, 4 * step - GAP, 3)
    first, second, third = pixels[:SIDE, :SIDE], pixels[:SIDE, 2 * step : 3 * step - GAP], pixels[step:, :SIDE]
    for place in ((159, 70), (100, 20), (100, 119)):
        assert tuple(first[place]) == colour_of(1)
    assert (first[100, 30:110] == 90).all()
    assert (second == 90).all()
    assert tuple(third[SIDE - 1, SIDE - 1]) == colour_of(0)
    assert (pixels[:SIDE, step : 2 * step - GAP] == 90).all(), "nothing was found"
