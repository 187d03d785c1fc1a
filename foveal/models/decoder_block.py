"""The decoder's blocks: timm's, without the rows of the first and last one that are computed twice or never read.

B images, L patches, M masked, C the other tokens, N = C + M tokens, E decoder width.
"""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from foveal.models.attention import SelfAttention


class MaskedTokens(NamedTuple):
    """The tokens of masked patches before the first block: they depend on the patch's position alone.

    ``by_position`` [L, E] are those of all positions, ``indices`` [B, M] the masked ones of each image, ``tokens``
    [B, M, E] the rows at these indices.
    """

    by_position: Tensor
    indices: Tensor
    tokens: Tensor


class DecoderBlock(Block):
    """timm's block, under its names, with two short cuts of the same mathematics.

    Every operation of a block but the attention's products treats each token alone. So the first block normalises and
    projects the masked tokens once per position, in place of once per image; and the last block, of which only the
    masked tokens are read, has no other queries, and no other rows in its projection and MLP.
    """

    attn: SelfAttention

    def forward(self, tokens: Tensor, masked: MaskedTokens | None = None, num_queries: int | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - timm's further arguments are of masks of attention
        """Return the block's output [B, N, E] of ``tokens`` [B, N, E], or its last ``num_queries`` rows.

        With ``masked``, the first block's argument, ``tokens`` are [B, C, E], before the masked ones.
        """
        if masked is None and num_queries is None:
            return super().forward(tokens)
        if masked is None:
            qkv = self.attn.qkv(self.norm1(tokens))
        else:
            qkv = self._project_once_per_position(tokens, masked)
            tokens = torch.cat([tokens, masked.tokens], dim=1)
        start = 0 if num_queries is None else tokens.shape[1] - num_queries
        tokens = tokens[:, start:] + self.attn.attend(qkv, start)
        return tokens + self.mlp(self.norm2(tokens))

    def _project_once_per_position(self, tokens: Tensor, masked: MaskedTokens) -> Tensor:
        """Return queries, keys and values [B, N, 3 E] of tokens [B, C, E] and of the masked tokens."""
        num_positions = len(masked.by_position)
        # In one call: an engine that shards weights gathers them there, and adds one gradient.
        rows = self.attn.qkv(self.norm1(torch.cat([masked.by_position, tokens.flatten(0, 1)])))
        # At least in fp32, because a position's gradients are added over images. torch adds them in a fixed order.
        exact = max(rows.dtype, torch.float32, key=lambda dtype: dtype.itemsize)
        of_masked = rows[:num_positions].to(exact)[masked.indices].to(rows.dtype)
        return torch.cat([rows[num_positions:].unflatten(0, tokens.shape[:2]), of_masked], dim=1)
