"""Options of a pack that all sources share."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from foveal.config import Config


class PackOptions(Config):
    """Options of a pack. All but ``workers`` can change the bytes of a shard."""

    name: str | None = Field(default=None, description="Name of the data set; default: the source's name.")
    shard_mb: float = Field(default=256.0, gt=0, description="Largest size of a shard in 10^6 bytes.")
    samples_per_shard: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of samples per shard, in place of --shard-mb; shards get equal counts.",
    )
    val_fraction: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="Fraction of every class, or of images without labels, for validation, if the source has no splits.",
    )
    workers: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Threads that read and encode; default: one per core.",
    )
    resize: int | None = Field(
        default=None, ge=1, description="Length of the shorter side in pixels; smaller images keep their size."
    )
    format: Literal["jpg", "png", "webp"] | None = Field(
        default=None, description="Re-encode images of other formats as jpg, png or webp."
    )
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Re-encode all JPEG and WebP at this quality; default: 90, and only images that change.",
    )
    bit_depth: int | None = Field(
        default=None,
        ge=9,
        le=16,
        description="Bits that images stored in 16 bits per pixel use, such as 12 of a sensor.",
    )
    skip_bad: bool = Field(default=False, description="Decode all images; skip and list images that do not decode.")

    @model_validator(mode="after")
    def _lossless(self) -> Self:
        if self.format == "png" and self.quality is not None:
            raise ValueError(f"quality={self.quality} is for jpg and webp, and format=png is lossless")
        return self

    @property
    def may_reencode(self) -> bool:
        """Whether the options may change an image's bytes."""
        return (self.resize, self.format, self.quality) != (None, None, None)
