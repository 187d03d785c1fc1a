"""Initial decoder weights: those of a masked autoencoder of others, beside its encoder (``init_decoder``)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from foveal.errors import ExportError
from foveal.models.config import DecoderConfig, ResolvedVitConfig
from foveal.models.mae import Decoder
from foveal.models.timm_vit import Encoder
from foveal.weights.decoder_names import rename_decoder
from foveal.weights.export import check_and_select_weights, check_finite, load_weights_strict
from foveal.weights.hub_files import HubFiles


def inspect_init_decoder(
    path: Path,
    weights: dict[str, Tensor],
    encoder: Encoder,
    decoder: DecoderConfig,
    model: ResolvedVitConfig,
    channels: int,
    patch_grid: tuple[int, int],
    hub: HubFiles,
) -> str:
    """Check the decoder among foreign weights against the settings, and return a sentence about it for the plan.

    ``encoder`` is on the meta device; ``patch_grid`` is (rows, columns) in the source.
    Raises: ExportError that lists what does not fit.
    """
    renamed = rename_decoder(weights, model.patch, channels, patch_grid, path)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = nn.ModuleDict({"decoder": Decoder(decoder, encoder)})
    used = check_and_select_weights(module, renamed, path)
    check_finite(used, path)
    if hub.num_decoder_heads not in (None, decoder.heads):
        raise ExportError(
            f"{path} has decoder_num_attention_heads {hub.num_decoder_heads}, decoder.heads is {decoder.heads}; they "
            f"must be equal"
        )
    pixels = {True: "normalised pixels", False: "pixels that are not normalised", None: ""}[hub.norm_pix]
    return f"decoder: {len(used)} weights used" + (f", trained on {pixels} (config.json)" if pixels else "")


def load_init_decoder(
    decoder: Decoder,
    weights: dict[str, Tensor],
    model: ResolvedVitConfig,
    channels: int,
    patch_grid: tuple[int, int],
    path: Path,
) -> None:
    """Load the decoder among foreign weights; arguments as for ``inspect_init_decoder``. Raises: ExportError."""
    renamed = rename_decoder(weights, model.patch, channels, patch_grid, path)
    load_weights_strict(nn.ModuleDict({"decoder": decoder}), renamed, path)
