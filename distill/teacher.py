"""A frozen teacher. It is no module, so that nothing that trains a model can reach into it."""

from pathlib import Path

import torch
from torch import Tensor

from foveal.checkpoint.export import load_strictly, read_export
from foveal.distributed.engine import Precision, autocast
from foveal.models.encode import features
from foveal.models.resize import resized_from_card
from foveal.models.vit import encoder_from_card


class Teacher:
    """An encoder from an export, on a device, in evaluation mode for ever."""

    def __init__(
        self, folder: Path, device: torch.device, precision: Precision, image_size: int | tuple[int, int] | None = None
    ) -> None:
        """``image_size`` is that of the images that it will see; none: of those that it was trained on."""
        weights, card = read_export(folder)
        where = str(folder / "card.json")
        size = {} if image_size is None else {"image_size": image_size}
        self.encoder = encoder_from_card(card.encoder | size, where)
        load_strictly(self.encoder, resized_from_card(weights, self.encoder, card.encoder, where), folder)
        self.encoder.to(device).eval().requires_grad_(False)
        self._precision: Precision = precision

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The lesson: class token [B, T] and patches [B, L, T], fp32, of normalised images [B, C, H, W]."""
        with autocast(images.device, self._precision):
            cls_BT, patches_BLT = features(self.encoder, images)
        return cls_BT.float(), patches_BLT.float()
