"""What stands on an encoder in fine-tuning. B images."""

from typing import Any

from torch import Tensor, nn

from foveal.models.backbone import set_recompute
from foveal.models.droppath import set_drops
from foveal.models.places import read_across, set_kept


class Classifier(nn.Module):
    """An encoder with classes, or any model of timm that has them, whose drop path takes its draws as an argument."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        assert encoder.num_classes > 0, "build_encoder(classes=...) makes an encoder with a head"
        self.encoder = encoder

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W].

        ``noise`` [B, drop_path_sites(encoder)] is uniform and decides which sample skips which branch; it is needed in
        training when there are such sites, and not looked at in evaluation.
        """
        set_drops(self.encoder, noise)
        set_kept(self.encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        return self.encoder(images.to(next(self.encoder.parameters()).dtype))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass. Errors: ConfigError where timm cannot."""
        set_recompute(self.encoder, enable)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return read_across(self.encoder)
