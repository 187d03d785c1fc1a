"""Where tokens are: what timm's encoders are told of the places of the patches that an image keeps.

Positions are added to patches (learned, or sines and cosines), added to attention (a relative bias), or turn queries and
keys (rotary); an encoder may have more than one. B images, L patches, K kept, R registers, D width, N = 1 + R + K tokens.
"""

from typing import Any

import torch
from timm.layers.pos_embed_rel import RelPosMlp
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from foveal.models.timm_vit import has_absolute_positions, has_rotary_positions


class VisibleRelPosMlp(RelPosMlp):
    """timm's bias of attention by the distance of two patches (Swin V2, 2022), for the patches that an image keeps.

    The places come from ``set_kept`` and stay until the next one: recomputed activations must see the same.
    """

    def __init__(self, template: RelPosMlp) -> None:
        hidden: Any = template.mlp.fc1.out_features
        super().__init__(template.window_size, template.num_heads, hidden, template.prefix_tokens, template.mode)
        self.mlp.drop1.p = 0.0  # timm's 1/8 would be drawn from the global generator
        self.visible_indices: Tensor | None = None

    def get_bias(self) -> Tensor:
        """The bias [B, heads, N, N] of kept patches, or [1, heads, 1 + L, 1 + L]; none for the class token."""
        bias = super().get_bias()
        if self.visible_indices is None:
            return bias
        places_BN = nn.functional.pad(self.visible_indices + 1, (1, 0))
        return bias[0][:, places_BN[:, :, None], places_BN[:, None, :]].transpose(0, 1)


def replace_relative_biases(encoder: nn.Module) -> None:
    """Replace every relative bias of timm's inside an encoder by one that can be told which patches there are."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is RelPosMlp:
                setattr(module, name, VisibleRelPosMlp(child))


def set_visible_indices(encoder: nn.Module, visible_indices: Tensor | None) -> None:
    """Say which patches [B, K] the next forward's tokens are, behind a class token; None: all, in their order."""
    for module in encoder.modules():
        if isinstance(module, VisibleRelPosMlp):
            module.visible_indices = visible_indices


def add_positions_and_prefix(encoder: Any, tokens: Tensor, visible_indices: Tensor | None) -> Tensor:
    """Embedded patches [B, K, D] with the positions that are added to them, behind the class token and registers: [B, N, D]."""
    registers = getattr(encoder, "reg_token", None)
    first = encoder.cls_token if registers is None else torch.cat([encoder.cls_token, registers], dim=1)
    if has_absolute_positions(encoder):
        # A table has rows for the class token and the registers, or none.
        place, own = encoder.pos_embed, encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches
        positions = place[:, own:]
        tokens = tokens + (positions if visible_indices is None else positions[0, visible_indices])
        first = first + place[:, :own] if own else first
    return torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)


def get_rotary_embeddings(encoder: Any, visible_indices: Tensor | None) -> list[tuple[Tensor, ...]]:
    """What each block takes beside its tokens: sines and cosines [1 or B, 1 or heads, K, 2 D / heads], or nothing."""
    depth = len(encoder.blocks)
    if not has_rotary_positions(encoder):
        return [()] * depth
    table = encoder.rope.get_embed()
    if encoder.rope_mixed:  # frequencies are learned, for each block and head: [depth, heads, L, ...]
        table = table if visible_indices is None else table[:, :, visible_indices].movedim(2, 1)
        return [(each,) for each in table]
    return [(table if visible_indices is None else table[visible_indices][:, None],)] * depth


def find_cross_module_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters that a part of timm's encoder reads in another part, which is not called for it."""
    found = []
    if has_rotary_positions(encoder):
        found += encoder.get_submodule("rope").parameters()
    for module in encoder.modules():
        if isinstance(module, EvaAttention) and module.qkv is not None and module.q_bias is not None:
            found.append(module.qkv.weight)
    return found
