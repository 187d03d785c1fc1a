"""The card of an export: what the weights do not hold, and how images become the model's input."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from foveal.config import height_and_width
from foveal.data.config import AugmentConfig, DataConfig
from foveal.renames import translate_metrics, translate_setting

EXPORT_FORMAT = 1
_EVALUATED = ("val_", "fold_", "holdout_")  # prefixes of metrics of images that no step has seen
_MOST_RESULTS = 4  # in a line


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Card:
    """The metadata of an export.

    ``encoder`` rebuilds the module (sizes, grid, position type, pooling, channels); ``mean`` and ``std`` are of pixels
    in [0, 1]; ``classes`` are the class names in the order of the head's outputs, empty for an encoder;
    ``resized_from`` is the image size of the initial export, if this stage used a different one; ``head`` rebuilds the
    head in ``head.safetensors`` (its ``kind`` first), None without that file; ``inputs`` are what the run was made from
    (``foveal.runs.inputs``), with absolute paths, for ``foveal lineage``; empty in cards of versions that recorded none.
    """

    stage: str
    encoder: dict[str, Any]
    mean: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    classes: tuple[str, ...] = ()
    resized_from: int | tuple[int, ...] | None = None
    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    science: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sha256: str = ""
    format: int = EXPORT_FORMAT
    head: dict[str, Any] | None = None
    head_sha256: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)


def settings_of(card: Card) -> dict[str, Any]:
    """Return the science settings of a card's run under the names of today."""
    return dict(translate_setting(name, value) for name, value in card.science.items())


def task_of(card: Card) -> str | None:
    """Return the task of a card's head, by the setting ``task`` of fine-tuning; None without a head.

    A head of the encoder's own is of what its run states; DINOv2's, for example, are of no run.
    """
    if card.head is not None:
        return str(card.head["kind"])
    return str(settings_of(card).get("task", "classification")) if card.encoder.get("classes") else None


def brief_results(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the first finite metrics of images that no step has seen, by their names of today."""
    named = translate_metrics(dict(metrics)).items()
    finite = {name: float(value) for name, value in named if isinstance(value, int | float) and math.isfinite(value)}
    evaluated = [(name, value) for name, value in finite.items() if name.startswith(_EVALUATED)]
    return dict(evaluated[:_MOST_RESULTS])


def evaluated_metrics(card: Card, student: str | None = None) -> dict[str, Any]:
    """Return the metrics of a card that were measured on images that no step has seen.

    student: name of one of several students, whose metrics are wanted without those of the others.
    """
    metrics = {name: value for name, value in card.metrics.items() if name.startswith(_EVALUATED)}
    if student is None:
        return metrics
    own = f"{student}/"
    return {name: value for name, value in metrics.items() if "/" not in name or name.partition("_")[2].startswith(own)}


@dataclasses.dataclass(frozen=True, slots=True)
class EvalPixels:
    """How the evaluation of a run reads images; what the run did not state is as in a run without settings.

    ``image_hw``: size of the model's input in pixels. ``eval_hw``: that of the images in evaluation. ``crop_ratio``: the side of
    the centre crop over that of the largest one. ``mean`` and ``std`` have a value for every channel.
    """

    image_hw: tuple[int, int]
    eval_hw: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    interpolation: str
    jpeg_scaling: bool
    decode_version: int
    bit_depth: int | None


def eval_pixels_from_card(card: Card) -> EvalPixels:
    """Return how the evaluation of a card's run reads images."""
    settings, defaults = settings_of(card), DataConfig.model_fields
    channels = card.encoder["channels"]
    image_hw = _height_and_width(card.encoder["image_size"])
    eval_size = settings.get("data.eval_size")
    mean, std = (values * max(1, channels // len(values)) for values in (card.mean, card.std))
    return EvalPixels(
        image_hw=image_hw,
        eval_hw=image_hw if eval_size is None else _height_and_width(eval_size),
        channels=channels,
        mean=mean,
        std=std,
        crop_ratio=settings.get("data.eval_crop_ratio", defaults["eval_crop_ratio"].default),
        interpolation=settings.get("data.augment.interpolation", AugmentConfig.model_fields["interpolation"].default),
        jpeg_scaling=settings.get("data.jpeg_scaling", defaults["jpeg_scaling"].default),
        decode_version=settings.get("data.decode_version", 1),  # runs before it had a name read by the first rules
        bit_depth=settings.get("inherited.bit_depth"),
    )


def _height_and_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of an image size, as a setting or in JSON."""
    if isinstance(size, list):
        height, width = size
        return height, width
    return height_and_width(size)
