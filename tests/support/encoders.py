"""Small encoders of every kind of timm's that foveal trains, with weights that leave no part silent."""

import torch
from torch import nn

from foveal.models.config import DecoderConfig, Pooling, Positions, VitConfig
from foveal.models.mae import MaskedAutoencoder
from foveal.models.timm_vit import Encoder
from foveal.models.vit import build_encoder

# timm's names and what their patches get beside what attention sees.
PLAIN = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
]
RELATIVE = ["vit_relpos_medium_patch16_cls_224", "vit_relpos_base_patch16_clsgap_224"]
ROTARY = ["vit_small_patch16_rope_224", "vit_base_patch16_rope_mixed_224"]
BOTH = ["vit_small_patch16_rope_mixed_ape_224", "eva02_tiny_patch14_224", "eva02_base_patch16_clip_224"]
KINDS: list[tuple[str, Positions | None]] = [
    *((name, positions) for name in (*PLAIN, *BOTH) for positions in ("sincos", "learned")),
    *((name, None) for name in (*RELATIVE, *ROTARY)),
]


def encoder_of(
    name: str,
    positions: Positions | None,
    size: int | tuple[int, int] = 16,
    *,
    drop_path: float = 0.0,
    pooling: Pooling = "token",
    classes: int = 0,
) -> Encoder:
    """An encoder of 2 blocks of width 48, patches of 4: every weight is drawn, for layer scales begin at 1e-6."""
    torch.manual_seed(0)
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3, positions=positions)
    encoder = build_encoder(cfg, image_size=size, channels=3, drop_path=drop_path, pooling=pooling, num_classes=classes)
    shaken(encoder)
    return encoder


def shaken(module: nn.Module) -> None:
    """Draw what can learn, once more: biases that are not 0, norms and scales that are not 1."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=0.2 if parameter.ndim == 1 else 0.0, std=0.3)


def autoencoder_of(
    name: str, positions: Positions | None, size: int | tuple[int, int] = 16, *, drop_path: float = 0.0
) -> MaskedAutoencoder:
    """A masked autoencoder around such an encoder."""
    encoder = encoder_of(name, positions, size, drop_path=drop_path)
    return MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1, heads=2))
