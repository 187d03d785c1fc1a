"""Decoders of others' masked autoencoders under foveal's names, and refusals. Their predictions: test_init_decoder.py."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveal.errors import ExportError
from foveal.models.sincos import sincos_positions
from foveal.weights.decoder_names import rename_decoder

HERE = Path("mae.pth")


def decoder() -> dict[str, Tensor]:
    """A decoder of width 8 without blocks, for patches of 2 x 2 and 3 channels on a grid of 2 x 3."""
    positions = torch.cat([torch.zeros(1, 8), sincos_positions(2, 3, 8)])[None]
    return {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 16),
        "decoder_pos_embed": positions,
        "decoder_pred.bias": torch.arange(12.0),
        "patch_embed.proj.weight": torch.ones(1),
    }


@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_pixels_are_ordered_by_channel(prefix: str) -> None:
    weights = {prefix + name if name != "patch_embed.proj.weight" else name: v for name, v in decoder().items()}
    renamed = rename_decoder(weights, 2, 3, (2, 3), HERE)
    assert renamed.keys() == {"decoder.mask_token", "decoder.embed.weight", "decoder.predict.bias"}
    assert renamed["decoder.predict.bias"].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    other_size = rename_decoder(weights, 2, 1, (2, 3), HERE)
    assert other_size["decoder.predict.bias"].shape == (12,), "the shape is refused where the decoder is known"


@pytest.mark.parametrize(
    ("change", "grid", "sentence"),
    [
        ({"decoder_embed.weight": None}, (2, 3), "holds no decoder under the names of MAE's code or of Hugging Face's"),
        (
            {"decoder_mlp.weight": torch.ones(1)},
            (2, 3),
            "a decoder with names that are not translated: decoder_mlp.weig",
        ),
        ({"decoder.decoder_layers.0.x": torch.ones(1)}, (2, 3), "not translated: decoder_layers.0.x [1]"),
        ({}, (3, 2), "has decoder_pos_embed [1, 7, 8], which are not the sine-cosine positions of 3 x 2 patches"),
        ({}, (2, 2), "which are not the sine-cosine positions of 2 x 2 patches"),
        (
            {"decoder_pos_embed": decoder()["decoder_pos_embed"] + 0.1},
            (2, 3),
            "which are not the sine-cosine positions",
        ),
    ],
)
def test_other_decoders_are_one_sentence(
    change: dict[str, Tensor | None], grid: tuple[int, int], sentence: str
) -> None:
    weights = {name: value for name, value in (decoder() | change).items() if value is not None}
    with pytest.raises(ExportError) as caught:
        rename_decoder(weights, 2, 3, grid, HERE)
    assert str(caught.value).startswith("mae.pth ")
    assert sentence in str(caught.value)


def test_a_position_of_the_class_token_is_refused() -> None:
    """foveal's decoder adds none, and its bias is every token's."""
    weights = decoder()
    weights["decoder_pos_embed"][:, 0] = 0.1
    with pytest.raises(ExportError, match="which are not the sine-cosine positions of 2 x 3 patches"):
        rename_decoder(weights, 2, 3, (2, 3), HERE)
