"""The masked autoencoder of a config."""

from typing import Any

from foveal.models.mae import MaskedAutoencoder
from pretrain.config import PretrainConfig


def autoencoder_from_config(encoder: Any, cfg: PretrainConfig) -> MaskedAutoencoder:
    """Return the autoencoder on an encoder, with a newly initialised decoder; an EMA begins as a copy of the encoder."""
    return MaskedAutoencoder(
        encoder,
        cfg.decoder,
        predict_features=cfg.target == "features",
        predict_image=cfg.image_loss_weight > 0,
        with_ema=cfg.uses_ema,
    )
