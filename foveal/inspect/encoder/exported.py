"""The encoder of an export, to look into it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.inference.exported_model import build_exported_encoder, find_export, task_of_export
from foveal.inference.image_transform import ImageTransform, transform_from_card
from foveal.inspect.encoder.pictures import draw_encoder_pictures
from foveal.inspect.picture import Picture
from foveal.weights.card import eval_pixels_from_card, settings_of
from foveal.weights.export import read_card


@dataclass(frozen=True)
class InspectedEncoder:
    """An encoder in evaluation mode on a device, and how its images are made.

    module: with a head if the encoder has one of its own. classes: of that head; empty for any other head.
    """

    path: Path
    module: Any
    transform: ImageTransform
    classes: tuple[str, ...]
    device: torch.device
    label_field: str | None = None  # member of a shard's samples that is never their image

    def draw_pictures(self, pixels: Tensor, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Picture]]:
        """Yield the pictures of the encoder for pixels uint8 [B, C, H, W]. Raises: ExportError."""
        mean, std = self.transform.mean, self.transform.std
        captions = self._make_captions(pixels, names) if names else ()
        yield from draw_encoder_pictures(self.module, pixels, mean, std, self.device, captions=captions)

    @torch.no_grad()
    def _make_captions(self, pixels: Tensor, names: tuple[str, ...]) -> list[str]:
        """Return the images' names, of a classifier with the predicted class and its probability."""
        if not self.classes:
            return list(names)
        captions = []
        for name, image in zip(names, pixels, strict=True):
            scores = self.module(self.transform.normalise(image[None].to(self.device))).softmax(1)[0]
            best = int(scores.argmax())
            captions.append(f"{name}: {self.classes[best]} ({100 * float(scores[best]):.0f} %)")
        return captions


def load_inspected_encoder(path: str | Path, device: torch.device) -> InspectedEncoder:
    """Return the encoder of an export, or of the export in a run directory. Raises: ExportError."""
    folder = find_export(path)
    card = read_card(folder)
    with torch.random.fork_rng(devices=[]):  # the weights that a new encoder draws are overwritten
        encoder = build_exported_encoder(folder)
    # A task may evaluate larger images than the encoder takes, in windows.
    transform = replace(transform_from_card(card), image_hw=eval_pixels_from_card(card).image_hw)
    has_own_head = task_of_export(card) == "classification" and getattr(encoder, "num_classes", 0) == len(card.classes)
    label_field = settings_of(card).get("data.label_field")
    return InspectedEncoder(
        folder, encoder.to(device).eval(), transform, card.classes if has_own_head else (), device, label_field
    )
