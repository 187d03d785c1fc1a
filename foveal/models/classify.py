"""The classifier of fine-tuning. B images, K classes."""

import copy
from collections.abc import Collection
from typing import Any, Self

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from foveal.models.backbone import has_distillation_token
from foveal.models.batch_norm import add_auxiliary_batch_norms
from foveal.models.droppath import count_drop_paths
from foveal.models.encoder_with_head import EncoderWithHead, set_noise_cast_images
from foveal.models.token_positions import find_cross_module_parameters
from foveal.models.vit import HEAD_INIT_STD


class Classifier(EncoderWithHead):
    """An encoder, or model of timm, with a classification head, whose random numbers are arguments.

    Optional: dropout before the head, a partly frozen encoder, and an EMA of the encoder, which an engine updates
    (``Engine.update_ema``) and which replaces the encoder in evaluation.
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
        """``trainable_prefixes``: name prefixes of the weights that are trained; None: all weights.

        ``with_auxiliary_batch_norms``: separate BatchNorm layers for attacked images (``foveal.models.batch_norm``).
        ``with_distillation_token``: training also returns the logits of a distillation token, timm's own or the first
        register; the register's head is drawn from torch's global generator and is not part of the encoder.
        """
        super().__init__(encoder)
        assert encoder.num_classes > 0, "the encoder has no head: build it with num_classes"
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
    def drop_noise_per_image(self) -> int:
        """Uniform numbers per image in training: one per branch with drop path, and with dropout one per feature."""
        return count_drop_paths(self.encoder) + (self._head_in_features if self.dropout else 0)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, K] of normalised images [B, C, H, W]; in training also of a distillation token, if any.

        ``drop_noise`` [B, ``drop_noise_per_image``] is uniform and selects each sample's dropped branches and features.
        Training requires it if the size is not 0; evaluation ignores it.
        """
        encoder = self.encoder if self.training or self.averaged is None else self.averaged
        num_branches = count_drop_paths(encoder)
        images = set_noise_cast_images(encoder, images, None if drop_noise is None else drop_noise[:, :num_branches])
        if not self.training or (not self.dropout and self.head_dist is None):
            return encoder(images)
        tokens = encoder.forward_features(images)
        features = encoder.forward_head(tokens, pre_logits=True)
        if self.dropout:
            assert drop_noise is not None, "training with dropout needs drop_noise"
            features = features * (drop_noise[:, num_branches:] >= self.dropout) / (1 - self.dropout)
        logits = encoder.get_classifier()(features)
        return logits if self.head_dist is None else (logits, self.head_dist(tokens[:, 1]))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except that frozen modules stay in evaluation mode; copy the encoder's buffers to its EMA."""
        super().train(mode)
        if self._partially_frozen:
            for module in self.encoder.modules():
                trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                module.training = mode and trainable
        if self.averaged is not None:
            with torch.no_grad():
                for name, buffer in self.averaged.named_buffers():
                    buffer.copy_(self.encoder.get_buffer(name))
        return self

    def external_parameters(self) -> list[nn.Parameter]:
        """Return those of the encoder and of its EMA."""
        parameters = super().external_parameters()
        return parameters if self.averaged is None else parameters + find_cross_module_parameters(self.averaged)

    @property
    def _head_in_features(self) -> int:
        return self.encoder.get_classifier().in_features


def build_distillation_head(encoder: Any) -> nn.Linear:
    """Draw a head for an encoder's first register as distillation token (Touvron et al., "DeiT", 2021).

    Weights are drawn from torch's global generator.
    """
    head = nn.Linear(encoder.embed_dim, encoder.num_classes)
    trunc_normal_(head.weight, std=HEAD_INIT_STD)
    nn.init.zeros_(head.bias)
    return head
