"""The common part of classifier, segmenter and detector: an encoder whose random numbers are arguments."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from foveal.models.backbone import set_activation_checkpointing
from foveal.models.droppath import set_drop_path_noise
from foveal.models.timm_vit import find_transformer_blocks
from foveal.models.token_positions import find_cross_module_parameters, set_relative_bias_indices


class EncoderWithHead(nn.Module):
    """A foveal encoder or a model of timm, on which a subclass puts a head."""

    def __init__(self, encoder: Any, unused_parameters: Collection[str] = ()) -> None:
        """``unused_parameters``: names of the encoder's parameters that no output depends on; they are frozen."""
        super().__init__()
        self.encoder = encoder
        for name in unused_parameters:
            encoder.get_parameter(name).requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the encoder's blocks in the backward pass. Raises: ConfigError if timm does not support it."""
        set_activation_checkpointing(self.encoder, enable)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return the encoder's ``find_cross_module_parameters``."""
        return find_cross_module_parameters(self.encoder)

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks that an engine may compile one by one."""
        return find_transformer_blocks(self)


def set_noise_cast_images(encoder: Any, images: Tensor, drop_noise: Tensor | None) -> Tensor:
    """Set the drop path noise and all patches for the next forward; return the images in the dtype of the weights."""
    set_drop_path_noise(encoder, drop_noise)
    set_relative_bias_indices(encoder, None)
    # An engine may have lowered the weights; under autocast they are float32.
    return images.to(next(encoder.parameters()).dtype)
