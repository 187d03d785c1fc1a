"""The simple feature pyramid: strides, sizes, and independence of images."""

import pytest
import torch

from foveal.models.pyramid import SimpleFeaturePyramid


@pytest.mark.parametrize(
    ("stride", "strides", "rows"),
    [
        (16, (4, 8, 16, 32), [24, 12, 6, 3]),
        (8, (4, 8, 16, 32), [12, 6, 3, 2]),
        (32, (4, 8, 16, 32), [48, 24, 12, 6]),
        (14, (3.5, 7, 14, 28), [24, 12, 6, 3]),
        (4, (4, 8, 16, 32), [6, 3, 2, 1]),
    ],
)
def test_its_maps_have_the_strides_that_it_says(stride: int, strides: tuple[float, ...], rows: list[int]) -> None:
    pyramid = SimpleFeaturePyramid(24, 16, stride)
    assert pyramid.strides == strides
    maps = pyramid(torch.randn(2, 24, 6, 3))
    assert [feature_map.shape[1:3] for feature_map in maps] == [(16, row) for row in rows]
    torch.stack([feature_map.square().sum() for feature_map in maps]).sum().backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())


def test_an_image_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    pyramid, feature_map = SimpleFeaturePyramid(24, 16, 16), torch.randn(3, 24, 4, 5)
    pairs = zip(pyramid(feature_map[1:2]), pyramid(feature_map), strict=True)
    assert all(torch.allclose(single, batch[1:2], atol=1e-6) for single, batch in pairs)
