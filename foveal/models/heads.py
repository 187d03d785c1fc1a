"""What stands on an encoder in distillation and fine-tuning. B images, L patches, D encoder width, T teacher width."""

from typing import Any

from torch import Tensor, nn

from foveal.models.backbone import set_recompute
from foveal.models.droppath import set_drops
from foveal.models.encode import borrowed, features
from foveal.models.outline import Encoder
from foveal.models.places import set_kept
from foveal.models.vit import initialise_linear


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


class Student(nn.Module):
    """An encoder with linear maps from its width to a teacher's."""

    def __init__(self, encoder: Encoder, teacher_width: int) -> None:
        """The maps are drawn from torch's global generator, after the encoder (``build_encoder``)."""
        super().__init__()
        self.encoder = encoder
        self.project_cls = nn.Linear(encoder.embed_dim, teacher_width)
        self.project_patches = nn.Linear(encoder.embed_dim, teacher_width)
        initialise_linear(self.project_cls)
        initialise_linear(self.project_patches)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses of the teacher's ``features``, (class token [B, T], patches [B, L, T]), of images [B, C, H, W]."""
        cls_BD, patches_BLD = features(self.encoder, images)
        return self.project_cls(cls_BD), self.project_patches(patches_BLD)

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass, as ``MaskedAutoencoder`` does."""
        self.encoder.set_grad_checkpointing(enable)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a forward reads outside the module that owns them (see ``foveal.models.encode``)."""
        return borrowed(self.encoder)
