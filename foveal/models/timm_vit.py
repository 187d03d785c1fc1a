"""timm's vision transformers by name: the three classes that foveal can train, and why others are refused."""

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
# Supported module types of each class: (block, attention, MLP).
_BLOCKS: dict[type, tuple[type, tuple[type, ...], tuple[type, ...]]] = {
    VisionTransformer: (Block, (Attention,), (Mlp,)),
    VisionTransformerRelPos: (RelPosBlock, (RelPosAttention,), (Mlp,)),
    Eva: (EvaBlock, (EvaAttention, AttentionRope), (Mlp, GluMlp, SwiGLU)),
}


@functools.cache
def build_meta_encoder(name: str) -> Any:
    """Return timm's encoder of this name on the meta device; it is cached, do not modify it.

    Raises: ConfigError if timm has no such name, or if the model is not a vision transformer that foveal can train.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models([*_NAME_PATTERNS]), n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "See timm.list_models('vit_*')."
        raise ConfigError(f"'{name}' is not a model of timm {timm.__version__}. {hint}")
    with torch.device("meta"):
        encoder = timm.create_model(name, pretrained=False)
    reason = _explain_unsupported(encoder)
    if reason:
        raise ConfigError(
            f"'{name}' is not a plain vision transformer ({reason}); use one such as 'vit_base_patch16_224', "
            "'vit_base_patch16_rope_224' or 'vit_relpos_base_patch16_cls_224' and set its patch, width, depth and heads"
        )
    return encoder


def find_transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks inside a model, of encoders, decoders and models of timm; a CNN has none."""
    return [module for module in model.modules() if isinstance(module, tuple(block for block, *_ in _BLOCKS.values()))]


def has_absolute_positions(encoder: Any) -> bool:
    """Return whether positions, fixed or learned, are added to the patches."""
    return getattr(encoder, "pos_embed", None) is not None


def has_rotary_positions(encoder: Any) -> bool:
    """Return whether queries and keys have rotary positions (Su et al., 2021)."""
    return getattr(encoder, "rope", None) is not None


def has_plain_attention(encoder: Any) -> bool:
    """Return whether ``foveal.models.attention.SelfAttention`` can replace the attention of an encoder's blocks."""
    return isinstance(encoder, VisionTransformer)


def get_encoder_sizes(encoder: Any) -> dict[str, Any]:
    """Return an encoder's sizes by the names of their settings."""
    block = encoder.blocks[0]
    hidden_width, width = block.mlp.fc2.in_features, encoder.embed_dim
    mlp_ratio = hidden_width / width
    if int(width * mlp_ratio) < hidden_width:  # timm rounds down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "patch": encoder.patch_embed.patch_size[0],
        "width": width,
        "depth": len(encoder.blocks),
        "heads": block.attn.num_heads,
        "registers": encoder.num_prefix_tokens - 1,
        "mlp_ratio": mlp_ratio,
    }


def get_class_specific_kwargs(encoder: Any, pooling: str, registers: int) -> dict[str, Any]:
    """Return timm's arguments beside the sizes that give every class one norm: after the mean, or on all tokens."""
    norm_after_pooling = pooling == "avg"
    if isinstance(encoder, VisionTransformerRelPos):
        return {"fc_norm": norm_after_pooling}
    if isinstance(encoder, Eva):
        norms = {"use_fc_norm": norm_after_pooling, "use_post_transformer_norm": not norm_after_pooling}
        return norms | {"dynamic_img_size": False, "num_reg_tokens": registers}
    return {"reg_tokens": registers}


def explain_no_fused_qkv(name: str) -> str | None:
    """Return why the blocks' queries, keys and values are not the output of a single layer; None if they are."""
    attention = build_meta_encoder(name).blocks[0].attn
    if getattr(attention, "qkv", None) is None:
        return "its queries, keys and values have a layer each"
    if getattr(attention, "q_bias", None) is not None:
        return "its attention adds biases to what its layer makes"
    return None


def _explain_unsupported(encoder: Any) -> str | None:
    """Return how a model differs from patches, a class token, positions and equal blocks; None if it does not."""
    if type(encoder) not in _BLOCKS:
        return f"timm builds it as {type(encoder).__name__}"
    block, patch_embed = encoder.blocks[0], encoder.patch_embed
    block_type, attention_types, mlp_types = _BLOCKS[type(encoder)]
    rope = getattr(encoder, "rope", None)
    relative = isinstance(encoder, VisionTransformerRelPos)
    differences = {
        "it has no class token": encoder.cls_token is None,
        "it has no positions": not (has_absolute_positions(encoder) or rope is not None or relative),
        "its patches are not embedded by one linear map": type(patch_embed) is not PatchEmbed
        or not isinstance(patch_embed.norm, nn.Identity),
        "its blocks are of another kind": type(block) is not block_type
        or type(block.attn) not in attention_types
        or type(block.mlp) not in mlp_types,
        "its relative bias is of another kind": relative and type(block.attn.rel_pos) is not RelPosMlp,
        "its rotary positions are of another kind": rope is not None
        and (type(rope) not in (RotaryEmbeddingCat, RotaryEmbeddingMixed) or rope.aug_active),
    }
    return next((reason for reason, applies in differences.items() if applies), None)
