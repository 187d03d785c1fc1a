"""Position information of timm's encoders, restricted to the visible patches of each image.

Positions are added to patches (learned or sine-cosine), added to attention logits (a relative bias), or rotate queries
and keys (rotary); an encoder may have several.
B images, L patches, K visible, R registers, D width, N = 1 + R + K tokens.
"""

from typing import Any, cast

import torch
from timm.layers.pos_embed_rel import RelPosMlp
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from foveal.models.timm_vit import has_absolute_positions, has_rotary_positions


class VisibleRelPosMlp(RelPosMlp):
    """timm's relative attention bias (Swin V2, 2022), restricted to the visible patches.

    ``set_relative_bias_indices`` sets the patches, which stay until the next call: recomputed activations need the same ones.
    """

    def __init__(self, template: RelPosMlp) -> None:
        hidden_width: Any = template.mlp.fc1.out_features
        super().__init__(template.window_size, template.num_heads, hidden_width, template.prefix_tokens, template.mode)
        self.mlp.drop1.p = 0.0  # timm's dropout of 1/8 would draw from the global generator
        self.visible_indices: Tensor | None = None

    def get_bias(self) -> Tensor:
        """Return the bias [B, heads, N, N] of visible patches, or [1, heads, 1 + L, 1 + L]; 0 for the class token."""
        bias = super().get_bias()
        if self.visible_indices is None:
            return bias
        token_indices_BN = nn.functional.pad(self.visible_indices + 1, (1, 0))
        return bias[0][:, token_indices_BN[:, :, None], token_indices_BN[:, None, :]].transpose(0, 1)


def replace_relative_biases(encoder: nn.Module) -> None:
    """Replace every ``RelPosMlp`` of timm's inside an encoder by ``VisibleRelPosMlp``."""
    for module in list(encoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is RelPosMlp:
                setattr(module, name, VisibleRelPosMlp(child))


def set_relative_bias_indices(encoder: nn.Module, visible_indices: Tensor | None) -> None:
    """Set the patch indices [B, K] of the next forward's tokens after the class token; None: all patches in order."""
    for module in encoder.modules():
        if isinstance(module, VisibleRelPosMlp):
            module.visible_indices = visible_indices


def add_positions_and_prefix(encoder: Any, tokens: Tensor, visible_indices: Tensor | None) -> Tensor:
    """Add absolute positions to embedded patches [B, K, D]; prepend class token and registers: [B, N, D]."""
    registers = getattr(encoder, "reg_token", None)
    prefix = encoder.cls_token if registers is None else torch.cat([encoder.cls_token, registers], dim=1)
    if has_absolute_positions(encoder):
        # pos_embed has rows for the class token and the registers, or for patches only.
        pos_embed = encoder.pos_embed
        num_prefix_rows = pos_embed.shape[1] - encoder.patch_embed.num_patches
        patch_positions = pos_embed[:, num_prefix_rows:]
        tokens = tokens + (patch_positions if visible_indices is None else patch_positions[0, visible_indices])
        prefix = prefix + pos_embed[:, :num_prefix_rows] if num_prefix_rows else prefix
    return torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)


def rotary_block_args(encoder: Any, visible_indices: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Return each block's further arguments: rotary sines and cosines [1 or B, 1 or heads, K, 2 D / heads], or none."""
    depth = len(encoder.blocks)
    if not has_rotary_positions(encoder):
        return [()] * depth
    table = encoder.rope.get_embed()
    if encoder.rope_mixed:  # learned frequencies per block and head: [depth, heads, L, ...]
        table = table if visible_indices is None else table[:, :, visible_indices].movedim(2, 1)
        return [(block_table,) for block_table in table]
    return [(table if visible_indices is None else table[visible_indices][:, None],)] * depth


def find_cross_module_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a module of timm's encoder reads from another module without calling that module."""
    parameters: list[nn.Parameter] = []
    if has_rotary_positions(encoder):
        parameters += encoder.get_submodule("rope").parameters()
    for module in encoder.modules():
        if isinstance(module, EvaAttention) and module.qkv is not None and module.q_bias is not None:
            parameters.append(cast(nn.Parameter, module.qkv.weight))
    return parameters
