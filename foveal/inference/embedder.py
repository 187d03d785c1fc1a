"""Features of an exported encoder, as probes read them. B images, L patches, D width."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveal.errors import ConfigError, ExportError
from foveal.inference.exported_model import build_exported_encoder, find_export
from foveal.inference.image_transform import ImageTransform, transform_from_card
from foveal.models.backbone import (
    BackboneCard,
    forward_pooled,
    forward_pooled_and_patches,
    infer_pooled_map_shapes,
)
from foveal.models.probes import encode_probe_features
from foveal.models.vit import EncoderCard, encoder_from_card
from foveal.weights.card import Card, eval_pixels_from_card
from foveal.weights.export import load_weights_strict, read_card, read_export

FEATURES = ("token", "mean", "patches")  # of a foveal encoder
POOLED = "pooled"  # of a model of timm, which has a pooling of its own
_POOLINGS = {"token": "token", "mean": "avg"}  # pooling of a probe, by feature


@dataclass(frozen=True)
class Embedder:
    """A frozen encoder that turns pixels into features.

    feature: of ``FEATURES``, or ``POOLED``. layer: the block behind which it is read, from 1; 0 for a model of timm.
    """

    path: Path
    card: Card
    module: nn.Module
    transform: ImageTransform
    feature: str
    layer: int
    extract: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> np.ndarray:
        """Return features of pixels uint8 [B, C, H, W]: float32 [B, D], or of patches float16 [B, L, D].

        Raises: ExportError if a feature is not finite.
        """
        features = self.extract(self.transform.normalise(pixels.to(self.device))).float().cpu()
        if not bool(features.isfinite().all()):
            raise ExportError(f"{self.path} gives features that are not finite: nothing can be done with them")
        # Normalised tokens are small, so that float16 suffices; it has 3 mantissa bits more than bfloat16.
        return (features.half() if self.feature == "patches" else features).numpy()


def load_embedder(path: str | Path, feature: str | None, layer: int | None, device: torch.device) -> Embedder:
    """Return the encoder of an export, or of a run directory, on a device.

    ``feature``: None for the one that the export's own pooling reads. ``layer``: None for the last block.
    Raises: ConfigError for a feature or a layer that the encoder does not have; ExportError.
    """
    folder = find_export(path)
    card = read_card(folder)
    module, feature, layer, extract = (_load_backbone if "timm" in card.encoder else _load_encoder)(
        folder, card, feature, layer
    )
    # A task may evaluate larger images than the encoder takes, in windows.
    transform = replace(transform_from_card(card), image_hw=eval_pixels_from_card(card).image_hw)
    return Embedder(folder, card, module.to(device).eval(), transform, feature, layer, extract, device)


_Loaded = tuple[nn.Module, str, int, Callable[[Tensor], Tensor]]


def _load_encoder(folder: Path, card: Card, feature: str | None, layer: int | None) -> _Loaded:
    """Load an encoder without its head, with its own norm before or after the pooling."""
    parsed_card = EncoderCard.from_dict(card.encoder, f"{folder}/card.json")
    depth, own_feature = parsed_card.depth, "mean" if parsed_card.pooling == "avg" else "token"
    feature, layer = feature or own_feature, depth if layer is None else layer
    if feature not in FEATURES:
        raise ConfigError(f"--feature {feature} does not exist; there are {', '.join(FEATURES)}")
    if not 1 <= layer <= depth:
        raise ConfigError(f"--layer {layer} does not exist: the encoder of {folder} has blocks 1 to {depth}")
    weights, _ = read_export(folder)
    encoder: Any = encoder_from_card(card.encoder, f"{folder}/card.json", num_classes=0)
    load_weights_strict(encoder, weights, folder, unused_prefixes=("head.",))

    def extract(images: Tensor) -> Tensor:
        pooled, patches = encode_probe_features(encoder, images, [layer], _POOLINGS.get(feature, "token"))
        return patches[0] if feature == "patches" else pooled[0]

    return encoder, feature, layer, extract


def _load_backbone(folder: Path, card: Card, feature: str | None, layer: int | None) -> _Loaded:
    """Load a model of timm, of which the pooled feature and the last map's locations are read."""
    parsed_card = BackboneCard.from_dict(card.encoder, f"{folder}/card.json")
    name = parsed_card.timm
    if layer is not None:
        raise ConfigError(f"--layer {layer}: of a model of timm ({name}) only the last map is read; leave it out")
    if feature not in (None, POOLED, "patches"):
        raise ConfigError(
            f"--feature {feature}: a model of timm ({name}) has a pooling of its own; leave it out, or give patches"
        )
    backbone = build_exported_encoder(folder)
    if feature == "patches":
        infer_pooled_map_shapes(*parsed_card.build_args)  # raises ConfigError if there is no map
        return backbone, feature, 0, lambda images: forward_pooled_and_patches(backbone, images)[1]
    return backbone, POOLED, 0, lambda images: forward_pooled(backbone, images)[0]
