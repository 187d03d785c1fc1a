"""What timm has under a name: one of three kinds of vision transformer that foveal can train, or a sentence why not."""

import difflib
import functools
import math
from typing import Any

import timm
import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_rel import RelPosMlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingMixed
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, VisionTransformerRelPos
from torch import nn

from foveal.errors import ConfigError

Encoder = VisionTransformer | VisionTransformerRelPos | Eva

_NAME_PATTERNS = ("vit_*", "deit*", "eva*", "beit*")
# What the blocks of each kind are made of: (block, its attention, its MLP).
_BLOCKS: dict[type, tuple[type, tuple[type, ...], tuple[type, ...]]] = {
    VisionTransformer: (Block, (Attention,), (Mlp,)),
    VisionTransformerRelPos: (RelPosBlock, (RelPosAttention,), (Mlp,)),
    Eva: (EvaBlock, (EvaAttention, AttentionRope), (Mlp, GluMlp, SwiGLU)),
}


@functools.cache
def build_meta_encoder(name: str) -> Any:
    """The encoder that timm has under a name, without memory for its weights; not to be changed.

    Raises: ConfigError unless it is a vision transformer that foveal can train.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models([*_NAME_PATTERNS]), n=3)
        hint = (
            f"Did you mean {' or '.join(repr(found) for found in close)}?"
            if close
            else "See timm.list_models('vit_*')."
        )
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")
    with torch.device("meta"):
        encoder = timm.create_model(name, pretrained=False)
    oddity = _explain_unsupported(encoder)
    if oddity:
        raise ConfigError(
            f"'{name}' is not a plain vision transformer ({oddity}); take one such as 'vit_base_patch16_224', "
            "'vit_base_patch16_rope_224' or 'vit_relpos_base_patch16_cls_224' and size it with patch, width, depth and heads"
        )
    return encoder


def has_absolute_positions(encoder: Any) -> bool:
    """Whether positions are added to the patches, fixed or learned."""
    return getattr(encoder, "pos_embed", None) is not None


def has_rotary_positions(encoder: Any) -> bool:
    """Whether queries and keys are turned by their places (rotary positions, Su et al., 2021)."""
    return getattr(encoder, "rope", None) is not None


def get_encoder_sizes(encoder: Any) -> dict[str, Any]:
    """The sizes that an encoder has, by the names of the settings."""
    block = encoder.blocks[0]
    hidden, width = block.mlp.fc2.in_features, encoder.embed_dim
    ratio = hidden / width
    if int(width * ratio) < hidden:  # timm takes the whole part
        ratio = math.nextafter(ratio, math.inf)
    return {
        "patch": encoder.patch_embed.patch_size[0],
        "width": width,
        "depth": len(encoder.blocks),
        "heads": block.attn.num_heads,
        "registers": encoder.num_prefix_tokens - 1,
        "mlp_ratio": ratio,
    }


def get_timm_kwargs(encoder: Any, pooling: str, registers: int) -> dict[str, Any]:
    """What timm must be told beside sizes, so that every kind has one norm: behind the mean, or else before the head."""
    behind = pooling == "avg"
    if isinstance(encoder, VisionTransformerRelPos):
        return {"fc_norm": behind}
    if isinstance(encoder, Eva):
        norms = {"use_fc_norm": behind, "use_post_transformer_norm": not behind}
        return norms | {"dynamic_img_size": False, "num_reg_tokens": registers}
    return {"reg_tokens": registers}


def explain_no_fused_qkv(name: str) -> str | None:
    """Why the blocks of an encoder have no layer that makes queries, keys and values at once; None if they have."""
    attention = build_meta_encoder(name).blocks[0].attn
    if getattr(attention, "qkv", None) is None:
        return "its queries, keys and values have a layer each"
    if getattr(attention, "q_bias", None) is not None:
        return "its attention adds biases to what its layer makes"
    return None


def _explain_unsupported(encoder: Any) -> str | None:
    """What makes a model other than patches, a class token, positions, and equal blocks; None if nothing."""
    if type(encoder) not in _BLOCKS:
        return f"timm builds it as {type(encoder).__name__}"
    block, embed = encoder.blocks[0], encoder.patch_embed
    kind, attentions, mlps = _BLOCKS[type(encoder)]
    rope, relative = getattr(encoder, "rope", None), isinstance(encoder, VisionTransformerRelPos)
    oddities = {
        "it has no class token": encoder.cls_token is None,
        "it has no positions": not (has_absolute_positions(encoder) or rope is not None or relative),
        "its patches are not embedded by one linear map": type(embed) is not PatchEmbed
        or not isinstance(embed.norm, nn.Identity),
        "its blocks are of another kind": type(block) is not kind
        or type(block.attn) not in attentions
        or type(block.mlp) not in mlps,
        "its relative bias is of another kind": relative and type(block.attn.rel_pos) is not RelPosMlp,
        "its rotary positions are of another kind": rope is not None
        and (type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingMixed) or rope.aug_active),
    }
    return next((sentence for sentence, found in oddities.items() if found), None)
