"""What stands on an encoder in fine-tuning. B images."""

import copy
from collections.abc import Collection
from typing import Any, Self

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from foveal.models.backbone import has_distillation_token, set_activation_checkpointing
from foveal.models.batch_norm import add_auxiliary_batch_norms
from foveal.models.droppath import count_drop_paths, set_drop_path_noise
from foveal.models.token_positions import find_cross_module_parameters, set_visible_indices
from foveal.models.vit import HEAD_INIT_STD


class Classifier(nn.Module):
    """An encoder with classes, or any model of timm that has them, whose random draws are arguments.

    On request the features before its head are dropped at random, all but its head is frozen, or a running average of it
    follows (an engine moves it, ``Engine.average``), which is what answers in evaluation.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        dropout: float = 0.0,
        trainable_prefixes: Collection[str] | None = None,
        with_ema: bool = False,
        with_auxiliary_batch_norms: bool = False,
        with_distillation_token: bool = False,
    ) -> None:
        """``trained``: the beginnings of the names of all weights that learn; none: every weight does.

        ``split``: BatchNorm has other weights and statistics for attacked images (``foveal.models.batch_norm``).
        ``tokened``: training gives the logits of a distillation token too, timm's or an encoder's first register, whose
        head is drawn from torch's global generator and is no part of the encoder.
        """
        super().__init__()
        assert encoder.num_classes > 0, "build_encoder(classes=...) makes an encoder with a head"
        self.encoder = encoder
        self.dropout = dropout
        self._partially_frozen = trainable_prefixes is not None
        if trainable_prefixes is not None:
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name.startswith(tuple(trainable_prefixes)))
        self.averaged = copy.deepcopy(encoder).requires_grad_(False) if with_ema else None
        self.twins = add_auxiliary_batch_norms(encoder) if with_auxiliary_batch_norms else None
        self.head_dist = None
        if with_distillation_token and has_distillation_token(encoder):
            encoder.set_distilled_training(True)
        elif with_distillation_token:
            self.head_dist = build_distillation_head(encoder)

    @property
    def drop_noise_size(self) -> int:
        """How many uniform numbers an image takes in training: one per branch with drop path, one per dropped feature."""
        return count_drop_paths(self.encoder) + (self._head_in_features if self.dropout else 0)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, classes] of normalised images [B, C, H, W]; in training a distillation token's too, if there is one.

        ``noise`` [B, sites] is uniform and decides which sample skips which branch and which of its features are
        dropped; it is needed in training when there are such sites, and not looked at in evaluation.
        """
        encoder = self.encoder if self.training or self.averaged is None else self.averaged
        branches = count_drop_paths(encoder)
        set_drop_path_noise(encoder, None if drop_noise is None else drop_noise[:, :branches])
        set_visible_indices(encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        images = images.to(next(encoder.parameters()).dtype)
        if not self.training or (not self.dropout and self.head_dist is None):
            return encoder(images)
        tokens = encoder.forward_features(images)
        features = encoder.forward_head(tokens, pre_logits=True)
        if self.dropout:
            assert drop_noise is not None, "training with dropout takes its draws"
            features = features * (drop_noise[:, branches:] >= self.dropout) / (1 - self.dropout)
        logits = encoder.get_classifier()(features)
        return logits if self.head_dist is None else (logits, self.head_dist(tokens[:, 1]))

    def train(self, mode: bool = True) -> Self:
        """As ever, but what is frozen stays in evaluation mode, and an average takes over what is no weight."""
        super().train(mode)
        if self._partially_frozen:
            for module in self.encoder.modules():
                module.training = mode and any(each.requires_grad for each in module.parameters(recurse=False))
        if self.averaged is not None:
            with torch.no_grad():
                for name, buffer in self.averaged.named_buffers():
                    buffer.copy_(self.encoder.get_buffer(name))
        return self

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass. Raises: ConfigError where timm cannot."""
        set_activation_checkpointing(self.encoder, enable)

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return find_cross_module_parameters(self.encoder) + (
            [] if self.averaged is None else find_cross_module_parameters(self.averaged)
        )

    @property
    def _head_in_features(self) -> int:
        return self.encoder.get_classifier().in_features


def build_distillation_head(encoder: Any) -> nn.Linear:
    """A head for an encoder's first register as distillation token (Touvron et al., "DeiT", 2021).

    It is drawn from torch's global generator.
    """
    head = nn.Linear(encoder.embed_dim, encoder.num_classes)
    trunc_normal_(head.weight, std=HEAD_INIT_STD)
    nn.init.zeros_(head.bias)
    return head
