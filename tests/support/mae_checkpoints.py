"""Masked autoencoders of others, tiny and random: Hugging Face's, and the names of MAE's reference code."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveal.models.sincos import sincos_positions

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


def hugging_face_mae(**settings: Any) -> Any:
    """A ViTMAEForPreTraining with weights far from their initial values; its positions are the formula's."""
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers, of the test extra")
    config = transformers.ViTMAEConfig(**SIZES | settings)
    model = transformers.ViTMAEForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(0)
    side = config.image_size // config.patch_size
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            width = parameter.shape[2]
            parameter.data = torch.cat([torch.zeros(1, width), sincos_positions(side, side, width)])[None]
    return model


def name_as_reference(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of Hugging Face's model under the names of MAE's reference code."""
    pairs = {
        r"^vit\.embeddings\.cls_token$": "cls_token",
        r"^vit\.embeddings\.position_embeddings$": "pos_embed",
        r"^vit\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"^vit\.layers\.": "blocks.",
        r"^vit\.layernorm\.": "norm.",
        r"^decoder\.decoder_layers\.": "decoder_blocks.",
        r"^decoder\.": "",
        r"attention\.o_proj": "attn.proj",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
    }
    weights = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for name in weights:
        if re.search(r"\.[kv]_proj\.", name):
            continue
        value = weights[name]
        if ".q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        new_name = name.replace("attention.q_proj", "attn.qkv")
        for old, new in pairs.items():
            new_name = re.sub(old, new, new_name)
        renamed[new_name] = value.clone()
    return renamed
