"""What stands on an encoder in distillation and fine-tuning. B images, L patches, D encoder width, T teacher width."""

from torch import Tensor, nn

from foveal.models.droppath import set_drops
from foveal.models.outline import Encoder
from foveal.models.places import read_across, set_kept
from foveal.models.vit import initialise_linear


class Classifier(nn.Module):
    """An encoder with classes, whose drop path takes its draws as an argument."""

    def __init__(self, encoder: Encoder) -> None:
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
        return self.encoder(_as_weights(self.encoder, images))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the blocks in the backward pass, as ``MaskedAutoencoder`` does."""
        self.encoder.set_grad_checkpointing(enable)


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
        """The parameters that a forward reads outside the module that owns them (see ``MaskedAutoencoder``)."""
        read = (self.encoder.cls_token, getattr(self.encoder, "pos_embed", None))
        return [parameter for parameter in read if parameter is not None] + read_across(self.encoder)


def features(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """What an encoder makes of normalised images [B, C, H, W] after its last norm: (class token [B, D], patches [B, L, D])."""
    assert not isinstance(encoder.norm, nn.Identity), "an encoder pooled by 'avg' has its norm after the pooling"
    set_kept(encoder, None)
    tokens_BND = encoder.forward_features(_as_weights(encoder, images))
    return tokens_BND[:, 0], tokens_BND[:, 1:]


def _as_weights(encoder: Encoder, images: Tensor) -> Tensor:
    """Images in the precision of the weights, which an engine may have lowered; under autocast they are float32."""
    return images.to(next(encoder.parameters()).dtype)
