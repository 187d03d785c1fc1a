"""Settings of encoders, decoder and heads, and the cards of heads; without torch and timm."""

import itertools
import math
from typing import Literal, Self

from pydantic import model_validator

from foveal.config import Config, height_and_width, science

Pooling = Literal["token", "avg"]
Positions = Literal["sincos", "learned"]
MaskStrategy = Literal["random", "block", "grid"]
SegmentationHeadKind = Literal["linear", "pyramid"]


class VitConfig(Config):
    """A vision transformer of timm, by name; the other settings override the named model's sizes."""

    name: str = science(
        "vit_base_patch16_224", "timm's name of a vision transformer with plain, rotary or relative positions."
    )
    patch: int | None = science(None, "Patch side in pixels; null: the named model's.", ge=1)
    width: int | None = science(None, "Token width (embedding dimension); null: the named model's.", ge=1)
    depth: int | None = science(None, "Number of blocks; null: the named model's.", ge=1)
    heads: int | None = science(None, "Attention heads per block; null: the named model's.", ge=1)
    mlp_ratio: float | None = science(
        None, "Hidden width of a block's MLP over the token width; null: the named model's.", gt=0
    )
    registers: int | None = science(
        None, "Register tokens, which attend to all patches and are discarded; null: the named model's.", ge=0
    )
    positions: Positions | None = science(
        "sincos",
        "Positions added to the patches: sine-cosine, fixed except in fine-tuning, or learned; null for names that add "
        "none.",
    )


class ResolvedVitConfig(VitConfig):
    """A ``VitConfig`` with every size filled in."""

    patch: int = science(description="Patch side in pixels.", ge=1)
    width: int = science(description="Token width (embedding dimension).", ge=1)
    depth: int = science(description="Number of blocks.", ge=1)
    heads: int = science(description="Attention heads per block.", ge=1)
    mlp_ratio: float = science(description="Hidden width of a block's MLP over the token width.", gt=0)
    registers: int = science(0, "Register tokens, which attend to all patches and are discarded.", ge=0)

    def patch_grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of an image's patches."""
        height, width = height_and_width(image_size)
        return height // self.patch, width // self.patch


class DecoderConfig(Config):
    """The transformer that predicts masked patches; it is discarded after pretraining."""

    width: int = science(512, "Token width (embedding dimension); a multiple of 4 and of heads.", ge=4)
    depth: int = science(8, "Number of blocks.", ge=1)
    heads: int = science(16, "Attention heads per block.", ge=1)
    mlp_ratio: float = science(4.0, "Hidden width of a block's MLP over the token width.", gt=0)

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.width % 4 or self.width % self.heads:
            step = math.lcm(4, self.heads)
            nearest = step * max(1, round(self.width / step))
            raise ValueError(f"width={self.width} is not a multiple of 4 and of heads={self.heads}; width={nearest} is")
        return self


class DetectorConfig(Config):
    """The pyramid and head of a detector."""

    width: int = science(256, "Channels of the pyramid's maps and of the head.", ge=32, multiple_of=32)
    layers: int = science(4, "Convolutions in each of the head's two branches, without the output layers.", ge=1)
    strides: tuple[int, ...] = science(
        (8, 16, 32, 64), "Strides of the pyramid's maps in pixels: powers of two times the encoder's.", min_length=1
    )

    @model_validator(mode="after")
    def _check_strides(self) -> Self:
        for finer, coarser in itertools.pairwise(self.strides):
            if coarser <= finer or coarser % finer or (coarser // finer).bit_count() != 1:
                raise ValueError(f"strides={list(self.strides)}: each must be the previous one times 2, 4, 8, ...")
        return self


class DetectionHeadCard(DetectorConfig):
    """The sizes from which a detector's pyramid and head are rebuilt, beside the encoder's card."""

    kind: Literal["detection"] = science("detection", "Kind of head.")
    classes: int = science(description="Number of classes.", ge=1)


class SegmentationHeadCard(Config):
    """The sizes from which a segmentation head is rebuilt, beside its encoder's card."""

    kind: Literal["segmentation"] = science("segmentation", "Kind of head.")
    head: SegmentationHeadKind = science(description="A linear map on the last feature map, or a pyramid of maps.")
    width: int = science(description="Channels of the pyramid's maps.", ge=1)
    classes: int = science(description="Number of classes.", ge=1)
