"""Sine-cosine positions compared with a loop and with Hugging Face."""

import math

import pytest
import torch

from foveal.errors import ConfigError
from foveal.models.sincos import sincos_positions


@pytest.mark.parametrize(("rows", "columns", "width"), [(4, 4, 8), (3, 5, 12), (14, 14, 192)])
def test_a_loop_gives_the_same(rows: int, columns: int, width: int) -> None:
    quarter = width // 4
    expected = torch.zeros(rows * columns, width, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for index in range(quarter):
                frequency = 1 / 10000 ** (2 * index / (width / 2))
                position = expected[row * columns + column]
                position[index] = math.sin(column * frequency)
                position[quarter + index] = math.cos(column * frequency)
                position[2 * quarter + index] = math.sin(row * frequency)
                position[3 * quarter + index] = math.cos(row * frequency)
    positions = sincos_positions(rows, columns, width)
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions.double(), expected, rtol=0, atol=1e-7)


def test_hugging_face_gives_the_same() -> None:
    vit_mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae", reason="needs transformers")
    embeddings = vit_mae.ViTMAEEmbeddings(vit_mae.ViTMAEConfig(hidden_size=64, image_size=56, patch_size=8))
    embeddings.initialize_weights()
    reference = embeddings.position_embeddings[0]
    assert torch.equal(reference[0], torch.zeros(64))
    torch.testing.assert_close(sincos_positions(7, 7, 64), reference[1:], rtol=0, atol=1e-7)


def test_a_width_that_four_does_not_divide_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"width=90: .* multiple of 4; the nearest is 88"):
        sincos_positions(2, 2, 90)
