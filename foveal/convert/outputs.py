"""An exported model as a function with named tensors, which a graph can hold. B images, C channels, H x W pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveal.convert.request import DEFAULTS, Options
from foveal.data.image.transforms import normalise
from foveal.errors import ExportError
from foveal.inference.exported_model import ENCODER, ExportedModel
from foveal.models.backbone import TIMM_ERRORS, forward_pooled_and_patches


class NamedOutputs(nn.Module):
    """A model whose outputs are a tuple; ``names`` has their names."""

    def __init__(self, model: ExportedModel, options: Options = DEFAULTS) -> None:
        """Raises: ExportError for patches of a model that has none."""
        super().__init__()
        self.module: Any = model.module
        self._patches, self._preprocess = options.patches, options.preprocess
        self._mean, self._std = model.card.mean, model.card.std
        if options.patches and model.task != ENCODER:
            raise ExportError(f"--patches is for encoders, and {model.path} is a model of task {model.task}")
        self.names = self._find_names(model)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for normalised images [B, C, H, W], or with preprocess for pixels of them, uint8."""
        if self._preprocess:
            images = normalise(images, self._mean, self._std)
        if self._patches:
            return forward_pooled_and_patches(self.module, images)
        outputs = self.module(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def to_input(self, pixels: Tensor) -> Tensor:
        """Return the argument of ``forward`` for pixels, uint8 [B, C, H, W]."""
        return pixels if self._preprocess else normalise(pixels, self._mean, self._std)

    @torch.no_grad()
    def from_pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name for pixels, uint8 [B, C, H, W]."""
        return self.name(self.eval()(self.to_input(pixels)))

    def name(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return outputs by their names."""
        return dict(zip(self.names, outputs, strict=True))

    @torch.no_grad()
    def _find_names(self, model: ExportedModel) -> tuple[str, ...]:
        """Run the model once: a head with several outputs names them itself."""
        pixels = torch.zeros(1, model.transform.channels, *model.transform.image_hw, dtype=torch.uint8)
        images = normalise(pixels, self._mean, self._std)
        if self._patches:
            try:
                forward_pooled_and_patches(self.module.eval(), images)
            except TIMM_ERRORS:
                raise ExportError(f"{model.path} has no patches: its model makes no map of features") from None
            return "features", "patches"
        outputs = self.module.eval()(images)
        if not isinstance(outputs, Tensor):
            return tuple(outputs._fields)
        return ("features",) if model.task == ENCODER else ("logits",)
