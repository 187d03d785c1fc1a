"""The settings of the data: what is read, how an epoch is ordered, how an image becomes pixels."""

import os
import re
from fractions import Fraction
from typing import Literal, Self

from pydantic import model_validator

from foveal.config import Config, ImageSize, explain_written_secret, height_and_width, machine, science
from foveal.errors import ConfigError
from foveal.redact import find_secret_in_text

LabelKind = Literal["class", "classes", "mask", "boxes"]


class AugmentConfig(Config):
    """Random resized crop and flip of training images (Szegedy et al., "Going deeper with convolutions", 2015)."""

    scale: tuple[float, float] = science((0.2, 1.0), "share of the image's area that a crop covers, lowest and highest")
    ratio: tuple[float, float] = science((3 / 4, 4 / 3), "width over height of a crop, over that of image_size")
    flip: float = science(0.5, "probability of a horizontal flip", ge=0, le=1)
    operations: int = science(0, "RandAugment: changes of color or shape that a training image gets", ge=0)
    magnitude: float = science(9.0, "RandAugment: how strong they are, of 10", ge=0, le=10)
    magnitude_std: float = science(0.5, "RandAugment: deviation of a change's magnitude", ge=0)
    interpolation: Literal["bicubic", "bilinear"] = science("bicubic", "how pixels are resampled, evaluation included")

    @property
    def is_max_center_crop(self) -> bool:
        """Whether the crop is the largest of the shape of image_size, in the centre, in every epoch."""
        return self.scale == self.ratio == (1.0, 1.0)

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample's pixels are the same in every epoch."""
        return self.is_max_center_crop and self.flip in (0.0, 1.0) and not self.operations

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale={list(self.scale)} must be [lowest, highest] within (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"augment.ratio={list(self.ratio)} must be [lowest, highest], above 0")
        return self


class CacheConfig(Config):
    """The node's own copy of shards that lie behind URLs; all ranks of a node share it, and so may several jobs."""

    dir: str | None = machine(None, "folder on the node's own disk; default: foveal-cache-<user id> in $TMPDIR or /tmp")
    gigabytes: float = machine(100.0, "the most that the folder holds, in 10^9 bytes; what was used last stays", gt=0)


class MixConfig(Config):
    """A further set of shards that training images are drawn from. Evaluation knows nothing of it."""

    path: str = machine(description="folder (or URL) of its shards")
    index: str | None = machine(None, "folder (or URL) of its manifest.json and *.index files; default: path")
    split: str = science("train", "the split that is drawn from")
    share: float = science(description="share of the training images that come from this set", gt=0, lt=1)


class FoldConfig(Config):
    """One of the parts that a split is cut into: it is what the others are judged on (k-fold cross-validation)."""

    of: int = science(description="parts that data.train is cut into, class by class, drawn by the seed", ge=2)
    number: int = science(description="the part that is kept out of training, from 0", ge=0)

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.number >= self.of:
            raise ValueError(f"number={self.number} is none of the {self.of} folds, whose numbers begin at 0")
        return self


class DataConfig(Config):
    """One set of shards and how it is read. Environment variables in paths are expanded."""

    path: str = machine(description="folder (or URL) of the shards")
    index: str | None = machine(None, "folder (or URL) of manifest.json and the *.index files; default: path")
    train: str = science("train", "the split that is trained on")
    val: str = science("val", "the split that is evaluated on")
    image_size: ImageSize = science(description="pixels of the image that the model sees: its side, or [height, width]")
    channels: Literal[1, 3] = science(3, "1: images are converted to grey, 3: to RGB")
    val_size: ImageSize | None = science(None, "pixels of an evaluated image, where others than image_size are seen")
    labels: LabelKind = science(
        "class", "what a sample's label is: a class, several, a mask of classes, or COCO's boxes"
    )
    label_field: str | None = science(None, "member that is the label; default: mask.png for masks, json for lists")
    ignore_id: int | None = science(255, "id in masks of what is to be left out", ge=0)
    lanes: int = science(32, "streams an epoch is dealt into; part of the order, independent of the cluster", ge=1)
    window: int = science(4, "the most shards that a lane shuffles over; it is cut into equal windows", ge=1)
    per_class: int | None = science(None, "train on this many samples of every class", ge=1)
    balance: float = science(
        0.0,
        "1: in an epoch every class comes as often as the largest, 0: as often as it is, between: its power",
        ge=0,
        le=1,
    )
    holdout_per_class: int = science(0, "samples of every class kept out of training, as the part 'holdout'", ge=0)
    fold: FoldConfig | None = science(None, "train on all folds but one, which is evaluated on instead of val")
    augment: AugmentConfig = science(AugmentConfig())
    crop_ratio: float = science(0.875, "evaluation: side of the centre crop over that of the largest one", gt=0, le=1)
    mean: tuple[float, ...] | None = science(None, "per channel, pixels in [0, 1]; default: the manifest's")
    std: tuple[float, ...] | None = science(None, "per channel, pixels in [0, 1]; default: the manifest's")
    jpeg_scaling: bool = science(True, "decode a JPEG at 1/2, 1/4 or 1/8 where the crop still has image_size pixels")
    mix: tuple[MixConfig, ...] = science((), "further sets, each with its share of the training images")
    threads: int = machine(2, "threads that read and decode", ge=1)
    ahead: int = machine(4, "micro-batches prepared ahead", ge=1)
    cache: CacheConfig = CacheConfig()
    patience_seconds: float = machine(600.0, "longest wait for data that does not move before the run stops", gt=0)
    max_bad: float = machine(0.001, "share of the training images that may be undecodable; more stop the run", ge=0)
    ledger: bool = machine(False, "write down which sample every step consumed, for `foveal data audit`")

    @property
    def image_hw(self) -> tuple[int, int]:
        """(height, width) of the image that the model sees."""
        return height_and_width(self.image_size)

    @property
    def eval_image_hw(self) -> tuple[int, int]:
        """(height, width) of an evaluated image."""
        return self.image_hw if self.val_size is None else height_and_width(self.val_size)

    @model_validator(mode="after")
    def _statistics(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for channels={self.channels}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std are given together or not at all")
        if self.mean is not None and not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean={list(self.mean)} must be within [0, 1]: it is of pixels divided by 255")
        if self.std is not None and not all(0 < value <= 1 for value in self.std):
            raise ValueError(f"std={list(self.std)} must be above 0 and at most 1: it is of pixels divided by 255")
        return self

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.mix and sum(Fraction(repr(other.share)) for other in self.mix) >= 1:
            raise ValueError(f"the shares in mix are {[other.share for other in self.mix]}, which leaves path none")
        return self


def expand_path(path_or_url: str, setting_name: str) -> str:
    """A folder or URL with ``~`` and environment variables replaced.

    Raises: ConfigError for a variable that is not set, or a secret that is written out; ``setting`` names the key,
    such as ``data.path``.
    """
    if what := find_secret_in_text(path_or_url):
        raise ConfigError(f"{setting_name}: {explain_written_secret(what)}")
    place = os.path.expanduser(os.path.expandvars(path_or_url))  # noqa: PTH111 - a Path would spoil URLs
    unset = re.search(r"\$\{?(\w+)\}?", place)
    if unset:
        raise ConfigError(
            f"{setting_name}: '{path_or_url}' needs the environment variable {unset[1]}, which is not set"
        )
    return place


def is_remote(path_or_url: str) -> bool:
    """Whether a place is a URL, read through fsspec, and not a folder."""
    return "://" in path_or_url
