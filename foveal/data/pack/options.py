"""How images become shards: what all sources have in common."""

import os
from typing import Literal, Self

from pydantic import Field, model_validator

from foveal.config import Config


class PackOptions(Config):
    """The options of a pack. The number of workers cannot change the bytes of a shard, the others can."""

    name: str | None = Field(default=None, description="Name of the data set; default: that of the source.")
    shard_mb: float = Field(default=256.0, gt=0, description="The most that a shard holds, in 10^6 bytes.")
    samples_per_shard: int | None = Field(
        default=None, ge=1, description="In place of --shard-mb: shards of equal counts, at most this."
    )
    val_fraction: float = Field(
        default=0.1, ge=0, le=0.9, description="Share of every class for validation, where the source has no splits."
    )
    workers: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        ge=1,
        description="Threads that read and encode; default: one per core.",
    )
    resize: int | None = Field(
        default=None, ge=1, description="Length of the shorter side in pixels; nothing is enlarged."
    )
    format: Literal["jpg", "png", "webp"] | None = Field(
        default=None, description="jpg, png or webp: re-encode what has another format."
    )
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Re-encode all JPEG and WebP with this; default: 90, and only what must change.",
    )
    skip_bad: bool = Field(default=False, description="Decode all images; leave out and list those that do not decode.")

    @model_validator(mode="after")
    def _lossless(self) -> Self:
        if self.format == "png" and self.quality is not None:
            raise ValueError(f"quality={self.quality} is for jpg and webp, and format is png, which loses nothing")
        return self

    @property
    def may_reencode(self) -> bool:
        """Whether images may be written otherwise than as they came."""
        return (self.resize, self.format, self.quality) != (None, None, None)
