"""Hugging Face's names and settings for timm's plain transformers: what ``ViTModel`` and ``ViTMAEForPreTraining`` hold.

Files get the names that transformers wrote before version 5, which the published checkpoints have and every version
reads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

_TOP_LEVEL = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_DECODER = {
    "embed": "decoder_embed",
    "mask_token": "mask_token",
    "norm": "decoder_norm",
    "predict": "decoder_pred",
}


def explain_not_vit(encoder: nn.Module) -> str | None:
    """Return what Hugging Face's ViT lacks of an encoder; None if it holds the encoder exactly."""
    if type(encoder) is not VisionTransformer:
        return f"ViT is timm's VisionTransformer, and this is a {type(encoder).__name__}"
    if encoder.global_pool != "token":
        return "ViT takes the class token, and this model pools its patches"
    untyped: Any = encoder
    return next((f"ViT has no {part}" for part, is_there in _list_foreign_parts(untyped) if is_there), None)


def _list_foreign_parts(encoder: Any) -> Iterator[tuple[str, bool]]:
    """Yield a part that a ViT of Hugging Face's lacks, and whether the encoder has it."""
    blocks, norm = list(encoder.blocks), encoder.norm
    yield "register tokens", getattr(encoder, "reg_token", None) is not None
    yield "model without a class token", encoder.cls_token is None
    yield "model without positions", encoder.pos_embed is None
    yield "norm before its blocks", not isinstance(encoder.norm_pre, nn.Identity)
    yield "norm after the pooling", not isinstance(encoder.fc_norm, nn.Identity)
    yield "pooling by attention", getattr(encoder, "attn_pool", None) is not None
    yield (
        "patch embedding of this kind",
        type(encoder.patch_embed) is not PatchEmbed or not isinstance(encoder.patch_embed.norm, nn.Identity),
    )
    yield "blocks of this kind", any(type(block) is not Block for block in blocks)
    yield "layer scale", any(not isinstance(scale, nn.Identity) for block in blocks for scale in (block.ls1, block.ls2))
    yield "attention of this kind", any(not _is_plain_attention(block.attn) for block in blocks)
    yield "MLP of this kind", any(not _is_plain_mlp(block.mlp) for block in blocks)
    yield "activation of this kind", get_activation_name(encoder) is None
    norms = [norm, *(each for block in blocks for each in (block.norm1, block.norm2))]
    yield "norm of this kind", any(not isinstance(each, nn.LayerNorm) or each.bias is None for each in norms)
    yield "norms of different kinds", len({getattr(each, "eps", None) for each in norms}) > 1


def _is_plain_attention(attention: Any) -> bool:
    parts = (attention.q_norm, attention.k_norm, attention.norm)
    return (
        isinstance(attention, Attention)
        and all(isinstance(part, nn.Identity) for part in parts)
        and getattr(attention, "gate", None) is None
        and attention.proj.bias is not None
    )


def _is_plain_mlp(mlp: Any) -> bool:
    biases = (mlp.fc1.bias, mlp.fc2.bias)
    return type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and None not in biases


def get_activation_name(encoder: Any) -> str | None:
    """Return Hugging Face's name of the MLPs' activation; None if there is none."""
    activation = encoder.blocks[0].mlp.act
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return {QuickGELU: "quick_gelu", GELUTanh: "gelu_pytorch_tanh"}.get(type(activation))


def build_vit_settings(encoder: Any) -> dict[str, Any]:
    """Return the settings that ``ViTConfig`` and ``ViTMAEConfig`` share."""
    block, (rows, columns) = encoder.blocks[0], encoder.patch_embed.img_size
    return {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": get_activation_name(encoder),
        "layer_norm_eps": encoder.norm.eps,
        "image_size": rows if rows == columns else [rows, columns],
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_channels": encoder.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }


def to_vit_weights(encoder: Any) -> dict[str, Tensor]:
    """Return an encoder's weights, without head, under the names of ``ViTModel``."""
    named: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        if name.startswith("blocks."):
            _, number, inner = name.split(".", 2)
            named |= to_layer_weights(f"encoder.layer.{number}", inner, value)
        elif name in _TOP_LEVEL:
            named[_TOP_LEVEL[name]] = value
    positions, width = named["embeddings.position_embeddings"], encoder.embed_dim
    if positions.shape[1] == encoder.patch_embed.num_patches:  # timm's class token may have no position
        named["embeddings.position_embeddings"] = torch.cat([positions.new_zeros(1, 1, width), positions], dim=1)
    named.setdefault("embeddings.patch_embeddings.projection.bias", positions.new_zeros(width))
    return named


def to_layer_weights(layer: str, inner: str, value: Tensor) -> dict[str, Tensor]:
    """Return a block's weight under Hugging Face's names; queries, keys and values have a layer each."""
    module, _, kind = inner.rpartition(".")
    if module == "attn.qkv":
        return {f"{layer}.{name}.{kind}": third for name, third in zip(_QKV, value.chunk(3), strict=True)}
    return {f"{layer}.{_LAYER[module]}.{kind}": value}


def to_decoder_weights(decoder: Any, channels: int, patch: int) -> dict[str, Tensor]:
    """Return a decoder's weights under the names of ``ViTMAEForPreTraining``, its formula of positions included."""
    named = {
        "decoder.decoder_pos_embed": torch.cat(
            [decoder.positions.new_zeros(1, decoder.positions.shape[1]), decoder.positions]
        )[None]
    }
    for name, value in decoder.state_dict().items():
        stem, _, kind = name.partition(".")
        if stem == "blocks":
            number, _, inner = kind.partition(".")
            named |= to_layer_weights(f"decoder.decoder_layers.{number}", inner, value)
        elif stem == "predict":  # Hugging Face orders a patch's values by row, column, channel
            named[f"decoder.decoder_pred.{kind}"] = reorder_patch_values(value, channels, patch, dim=0)
        else:
            named[f"decoder.{_DECODER[stem]}" + (f".{kind}" if kind else "")] = value
    return named


def reorder_patch_values(values: Tensor, channels: int, patch: int, dim: int) -> Tensor:
    """Return values ordered (channel, row, column) along ``dim`` in the order (row, column, channel)."""
    dim %= values.ndim
    return values.unflatten(dim, (channels, patch, patch)).movedim(dim, dim + 2).flatten(dim, dim + 2)
