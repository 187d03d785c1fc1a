"""What is read of a frozen encoder, and the head that attends to it.

B images, S layers, L patches, D width, F numbers of a feature (D, or 2 D for both), K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from foveal.models.encode import encode_layers
from foveal.models.timm_vit import Encoder
from foveal.models.vit import TOKEN_INIT_STD, init_linear_layers

_HEAD_INIT_STD = 0.01  # He et al., 2022, appendix A.2


def encode_probe_features(
    encoder: Encoder, images: Tensor, layers: Sequence[int], pooling: str
) -> tuple[Tensor, Tensor]:
    """Features [S, B, F] and patches [S, B, L, D] behind the given blocks (ascending, from 1) of normalised images.

    ``features``: ``token``, ``avg`` (the patches' mean) or ``both``, one behind the other. Every layer is read through
    the encoder's last norm, as DINOv2's evaluation does (Oquab et al., 2023): what the last block gives is then the
    final feature. An encoder that was trained on the mean of its patches has its norm behind the mean, and so it is read.
    """
    parts: Any = encoder
    behind = isinstance(encoder.norm, nn.Identity)
    norm = parts.fc_norm if behind else encoder.norm
    tokens = torch.stack(encode_layers(encoder, images, layers))
    normed = norm(tokens)
    token = normed[:, :, 0]
    patches = normed[:, :, encoder.num_prefix_tokens :]
    mean = norm(tokens[:, :, encoder.num_prefix_tokens :].mean(dim=2)) if behind else patches.mean(dim=2)
    return {"token": token, "avg": mean, "both": torch.cat([token, mean], dim=2)}[pooling], patches


class AttentiveHead(nn.Module):
    """One learned query attends to the patches, then a linear layer (as in CAE, Chen et al., 2022; AIM, El-Nouby et al., 2024)."""

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.pool = AttentionPoolLatent(width, out_features=0, num_heads=heads)
        self.head = nn.Linear(width, num_classes)
        init_linear_layers(self.pool)
        trunc_normal_(self.pool.latent, std=TOKEN_INIT_STD)
        trunc_normal_(self.head.weight, std=_HEAD_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Logits [B, K] of patches [B, L, D]."""
        return self.head(self.pool(patches))


def init_linear_heads(in_features: int, num_classes: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Weights [number, K, F] and biases [number, K] of heads that begin alike, as MAE's linear probing begins."""
    weight = trunc_normal_(torch.empty(num_classes, in_features), std=_HEAD_INIT_STD)
    return weight.repeat(num_heads, 1, 1), torch.zeros(num_heads, num_classes)
