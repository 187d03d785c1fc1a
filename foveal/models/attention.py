"""Self-attention of plain blocks: timm's, with one copy of the gradients of queries, keys and values less.

B images, N tokens, H heads, D width.
"""

from timm.layers.attention import Attention
from torch import Tensor
from torch.nn import functional as F


class SelfAttention(Attention):
    """timm's attention, under its names and with its bits.

    timm moves the axis of queries, keys and values to the front, and the backward pass copies their gradients there and
    back. Here the axis stays where the projection writes it, and the gradients are copied once.
    Sequences of at most ``max_explicit_tokens`` keys are multiplied and normalised here, without torch's fused kernel;
    an engine sets the number.
    """

    max_explicit_tokens = 0

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the output [B, N, D] of tokens [B, N, D]; masks are timm's, and nothing here has one."""
        if attn_mask is not None or is_causal or self.gate is not None:
            return super().forward(x, attn_mask, is_causal)
        return self.attend(self.qkv(x))

    def attend(self, qkv: Tensor, first_query: int = 0) -> Tensor:
        """Return the output [B, N - first_query, D] of the queries from a token on; qkv [B, N, 3 D] are projected."""
        heads = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        queries, keys, values = (part.transpose(1, 2) for part in heads)
        queries, keys = self.q_norm(queries[:, :, first_query:]), self.k_norm(keys)
        if self.fused_attn and qkv.shape[1] > self.max_explicit_tokens:
            attended = F.scaled_dot_product_attention(queries, keys, values)
        else:
            attended = ((queries * self.scale) @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        return self.proj(self.norm(attended.transpose(1, 2).flatten(2)))
