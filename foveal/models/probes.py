"""Features of a frozen encoder for probes, and the attentive and linear heads on them.

B images, S layers, L patches, D width, F feature width (D, or 2 D for pooling ``both``), K classes.
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

_HEAD_INIT_STD = 0.01  # of MAE's code (main_linprobe.py), after MoCo v3; the paper does not say


def encode_probe_features(
    encoder: Encoder, images: Tensor, block_numbers: Sequence[int], pooling: str
) -> tuple[Tensor, Tensor]:
    """Return features [S, B, F] and patches [S, B, L, D] after blocks ``layers`` (ascending, from 1) of images.

    ``pooling``: ``token``, ``avg`` (the patches' mean) or ``both``, concatenated in this order. The encoder's last norm
    is applied to every layer, as in DINOv2's evaluation (Oquab et al., 2023), so that the last block gives the final
    feature. An encoder trained on its patches' mean applies its norm after the mean, here too.
    """
    untyped_encoder: Any = encoder
    norm_after_pooling = isinstance(encoder.norm, nn.Identity)
    norm = untyped_encoder.fc_norm if norm_after_pooling else encoder.norm
    tokens = torch.stack(encode_layers(encoder, images, block_numbers))
    normed = norm(tokens)
    token = normed[:, :, 0]
    patches = normed[:, :, encoder.num_prefix_tokens :]
    mean = norm(tokens[:, :, encoder.num_prefix_tokens :].mean(dim=2)) if norm_after_pooling else patches.mean(dim=2)
    return {"token": token, "avg": mean, "both": torch.cat([token, mean], dim=2)}[pooling], patches


def encode_patch_mean(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the patches' mean [B, D] after the last block: the feature that a probe reads with pooling ``avg``."""
    return encode_probe_features(encoder, images, [len(encoder.blocks)], "avg")[0][0]


class AttentiveHead(nn.Module):
    """A learned query that attends to the patches, then a linear layer.

    The idea is that of CAE (Chen et al., 2022) and AIM (El-Nouby et al., 2024); the attention is timm's, which also
    projects the query and has biases, and there is no BatchNorm.
    """

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.pool = AttentionPoolLatent(width, out_features=0, num_heads=heads)
        self.head = nn.Linear(width, num_classes)
        init_linear_layers(self.pool)
        trunc_normal_(self.pool.latent, std=TOKEN_INIT_STD)
        trunc_normal_(self.head.weight, std=_HEAD_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Return logits [B, K] of patches [B, L, D]."""
        return self.head(self.pool(patches))


def init_equal_linear_heads(in_features: int, num_classes: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return weights [num_heads, K, F] and biases [num_heads, K] of equal heads, initialised as in MAE's code."""
    weight = trunc_normal_(torch.empty(num_classes, in_features), std=_HEAD_INIT_STD)
    return weight.repeat(num_heads, 1, 1), torch.zeros(num_heads, num_classes)
