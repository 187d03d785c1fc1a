"""The decoder as the MAE paper has it: every block on every token."""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from foveal.models.mae import Decoder


def decode_all_tokens(decoder: Decoder, features: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """What ``Decoder.forward`` returns, without its short cuts."""
    tokens: Tensor = decoder.embed(features)
    prefix, positions = tokens.shape[1] - visible.shape[1], decoder.positions.to(decoder.mask_token.dtype)
    shown, hidden = tokens[:, prefix:] + positions[visible], decoder.mask_token + positions[masked]
    tokens = torch.cat([tokens[:, :prefix], shown, hidden], dim=1)
    for block in decoder.blocks:
        tokens = Block.forward(block, tokens)  # type: ignore[arg-type]
    return decoder.predict(decoder.norm(tokens[:, -masked.shape[1] :]))
