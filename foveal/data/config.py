"""Data settings: shards, cache, sample order, subsets, augmentation."""

import os
import re
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from foveal.config import Config, ImageSize, explain_literal_secret, height_and_width, machine, science
from foveal.errors import ConfigError
from foveal.redact import describe_secret_in_urls


class RandAugmentConfig(Config):
    """RandAugment of training images (Cubuk et al., 2020), with timm's increasing ranges.

    Geometric operations have the interpolation of the crop and fill with the pixel mean, as in timm; with
    ``decode_version=1`` they are bilinear and fill with grey.
    """

    ops: int = science(0, "operations (color or shape) per training image; 0: none", ge=0)
    magnitude: float = science(9.0, "mean strength of an operation, of 10", ge=0, le=10)
    magnitude_std: float = science(0.5, "standard deviation of the strength", ge=0)


class AugmentConfig(Config):
    """Random resized crop and flip of training images (Szegedy et al., "Going deeper with convolutions", 2015)."""

    scale: tuple[float, float] = science((0.2, 1.0), "crop area as a fraction of the image's area: [lowest, highest]")
    ratio: tuple[float, float] = science(
        (3 / 4, 4 / 3), "aspect ratio (width / height) of a crop relative to image_size: [lowest, highest]"
    )
    hflip: float = science(0.5, "probability of a horizontal flip", ge=0, le=1)
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    interpolation: Literal["bicubic", "bilinear"] = science("bicubic", "resampling filter, in training and evaluation")

    @property
    def is_max_center_crop(self) -> bool:
        """Whether every crop is the largest center crop with the aspect ratio of image_size."""
        return self.scale == self.ratio == (1.0, 1.0)

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample has the same pixels in every epoch."""
        return self.is_max_center_crop and self.hflip in (0.0, 1.0) and not self.rand_augment.ops

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale={list(self.scale)} must be [lowest, highest] within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio={list(self.ratio)} must be [lowest, highest], above 0")
        return self


class CacheConfig(Config):
    """Local copies of remote shards, shared by all ranks of a node and possibly by several jobs."""

    dir: str | None = machine(None, "folder on the node's local disk; null: foveal-cache-<user id> in $TMPDIR or /tmp")
    max_gigabytes: float = machine(
        100.0, "limit of the folder in 10^9 bytes; least recently used files are removed first", gt=0
    )


class MixConfig(Config):
    """Additional data set of the training mixture; evaluation never reads it."""

    path: str = machine(description="folder or URL of its shards")
    index: str | None = machine(None, "folder or URL of its manifest.json and *.index files; null: path")
    split: str = science("train", "split to draw from")
    fraction: float = science(description="fraction of the training images from this data set", gt=0, lt=1)


class FoldConfig(Config):
    """Fold of a k-fold cross-validation that is evaluated on; the other folds are trained on."""

    of: int = science(description="number of folds of data.train, stratified by class, drawn from the seed", ge=2)
    number: int = science(description="fold that is excluded from training, from 0", ge=0)

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if self.number >= self.of:
            raise ValueError(f"number={self.number} is none of the {self.of} folds, whose numbers begin at 0")
        return self


class DataConfig(Config):
    """One data set and how to read it. Environment variables in paths are expanded."""

    path: str = machine(description="folder or URL of the shards")
    index: str | None = machine(None, "folder or URL of manifest.json and *.index files; null: path")
    train: str = science("train", "split for training")
    val: str = science("val", "split for evaluation")
    image_size: ImageSize = science(description="model input size in pixels: side, or [height, width]")
    channels: Literal[1, 3] = science(3, "1: convert images to grayscale, 3: to RGB")
    eval_size: ImageSize | None = science(None, "input size in evaluation, in pixels; null: image_size")
    decode_version: Literal[1, 2] = science(
        2,
        "version of the rules by which files become pixels and labels, and of RandAugment; 1: those of runs before 0.2",
        since="0.2",
        neutral=1,
    )
    weights_version: Literal[1, 2] = science(
        2,
        "version of the rules by which weights of others are read (pixel statistics, position grid, class names); 1: "
        "those of runs before 0.2",
        since="0.2",
        neutral=1,
    )
    label_field: str | None = science(
        None, "shard member that holds the label; null: the task's own, such as mask.png for segmentation"
    )
    ignore_id: int | None = science(255, "mask id of pixels without a label; null: none", ge=0)
    lanes: int | None = science(
        None,
        "streams that an epoch is split into; part of the sample order, independent of the cluster; null: 32, or where "
        "32 does not divide the batch into 2 images or more in each, the largest smaller number that does",
        ge=1,
    )
    window: int = science(
        4, "largest shuffle window of a lane, in shards; the windows of a lane have equal length", ge=1
    )
    samples_per_class: int | None = science(None, "training samples per class; null: all", ge=1)
    balance: float = science(
        0.0,
        "oversampling: a class of n samples appears n (largest / n)^balance times per epoch; 0: none, 1: equal classes",
        ge=0,
        le=1,
    )
    holdout_per_class: int = science(0, "samples per class excluded from training, as the subset 'holdout'", ge=0)
    fold: FoldConfig | None = science(
        None, "cross-validation: train on the other folds and evaluate on this fold instead of val; null: off"
    )
    augment: AugmentConfig = science(AugmentConfig())
    eval_crop_ratio: float = science(
        0.875, "evaluation: side of the center crop as a fraction of the largest possible one", gt=0, le=1
    )
    mean: tuple[float, ...] | None = science(None, "pixel mean per channel, in [0, 1]; null: the manifest's")
    std: tuple[float, ...] | None = science(
        None, "pixel standard deviation per channel, in [0, 1]; null: the manifest's"
    )
    jpeg_scaling: bool = science(
        True, "decode a JPEG at 1/2, 1/4 or 1/8 if the crop still has at least image_size pixels"
    )
    mix: tuple[MixConfig, ...] = science((), "additional data sets, each with its fraction of the training images")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = machine(
        "auto",
        "processes per rank that read and decode; 0: none, the training process does it; auto: one for each core of the "
        "rank but one, or 0 for a set that is read within seconds",
    )
    prefetch_batches: int = machine(4, "microbatches that the workers prepare ahead of the training loop", ge=1)
    cache: CacheConfig = CacheConfig()
    stall_timeout_seconds: float = machine(
        600.0, "seconds that reading data may make no progress before the run stops", gt=0
    )
    max_bad_fraction: float = machine(
        0.001, "fraction of training images that may fail to decode; more stop the run", ge=0
    )
    ledger: bool = machine(False, "record the samples of every step, for `foveal data audit`")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Model input size in pixels, (height, width)."""
        return height_and_width(self.image_size)

    @property
    def eval_image_hw(self) -> tuple[int, int]:
        """Input size in evaluation in pixels, (height, width)."""
        return self.image_hw if self.eval_size is None else height_and_width(self.eval_size)

    @model_validator(mode="after")
    def _check_pixel_stats(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for channels={self.channels}")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean={list(self.mean)} must be within [0, 1]: it is of pixels divided by 255")
        if self.std is not None and not all(0 < value <= 1 for value in self.std):
            raise ValueError(f"std={list(self.std)} must be above 0 and at most 1: it is of pixels divided by 255")
        return self

    @model_validator(mode="after")
    def _check_mix_shares(self) -> Self:
        if self.mix and sum(Fraction(repr(entry.fraction)) for entry in self.mix) >= 1:
            raise ValueError(
                f"the shares in mix are {[entry.fraction for entry in self.mix]}: their sum must be below 1"
            )
        return self


def expand_path(path_or_url: str, setting_name: str) -> str:
    """Expand ``~`` and environment variables in a path or URL; ``setting_name`` (``data.path``) is for error messages.

    Raises: ConfigError if a variable is not set or the text contains a secret.
    """
    if secret_kind := describe_secret_in_urls(path_or_url):
        raise ConfigError(f"{setting_name}: {explain_literal_secret(secret_kind)}")
    expanded = os.path.expanduser(os.path.expandvars(path_or_url))  # noqa: PTH111 - a Path would spoil URLs
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ConfigError(
            f"{setting_name}: '{path_or_url}' needs the environment variable {unset[1]}, which is not set"
        )
    return expanded


def is_url(path_or_url: str) -> bool:
    """Whether this is a URL, which is read through fsspec."""
    return "://" in path_or_url
