"""A detector: an encoder of foveal's or a model of timm, a pyramid of maps, and on each of them the head of FCOS. B images."""

import itertools
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead

from foveal.config import Config, height_and_width, science
from foveal.errors import ConfigError, ExportError
from foveal.models.backbone import (
    REFUSALS,
    BackboneCard,
    backbone_outline,
    build_backbone,
    card_of,
    last_map,
    said,
    set_recompute,
    shapes_of,
    times,
)
from foveal.models.droppath import set_drops
from foveal.models.fcos import Answers, places_of
from foveal.models.pyramid import SimplePyramid
from foveal.models.segment import unread
from foveal.models.token_positions import read_across, set_kept
from foveal.models.vit import EncoderCard, build_encoder


class DetectorSizes(Config):
    """What of a detector stands on its encoder."""

    width: int = science(256, "Channels of the pyramid's maps and of the head on them.", ge=32, multiple_of=32)
    layers: int = science(4, "Convolutions of each of the head's two branches before their last.", ge=1)
    strides: tuple[int, ...] = science(
        (8, 16, 32, 64), "Pixels between the places of each map: powers of two times the encoder's.", min_length=1
    )

    @model_validator(mode="after")
    def _coarser(self) -> Self:
        for one, other in itertools.pairwise(self.strides):
            if other <= one or other % one or (other // one).bit_count() != 1:
                raise ValueError(f"strides={list(self.strides)}: each must be the one before times 2, 4, 8, ...")
        return self


class DetectCard(DetectorSizes):
    """What it takes to build the pyramid and head of a detector again, beside the card of what they stand on."""

    kind: Literal["detection"] = science("detection", "what kind of head it is")
    classes: int = science(about="classes of its boxes", ge=1)


class Detector(nn.Module):
    """What Li et al. ("Exploring plain vision transformer backbones for object detection", 2022) put on a plain encoder.

    Their pyramid is of the last map alone; the head is torchvision's of FCOS, whose norms are over groups of channels,
    so that no image depends on another. The last map is the encoder's after its last norm.
    """

    def __init__(
        self, encoder: nn.Module, inside: int, stride: int, head: DetectCard, still: tuple[str, ...] = ()
    ) -> None:
        """``inside`` and ``stride`` are the width of the encoder's last map and the pixels between its places.

        What no map depends on (``still``: names of the encoder's parameters) learns nothing. The head is drawn from
        torch's global generator, after the encoder (``build_encoder``).
        """
        super().__init__()
        self.encoder = encoder
        for name in still:
            encoder.get_parameter(name).requires_grad_(False)
        self.head = PyramidHead(inside, stride, head)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Answers:
        """What the head says of normalised images [B, C, H, W]; ``noise`` as in ``foveal.models.classify.Classifier``."""
        set_drops(self.encoder, noise)
        set_kept(self.encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        return self.head(last_map(self.encoder, images.to(next(self.encoder.parameters()).dtype)))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the encoder's blocks in the backward pass. Errors: ConfigError where timm cannot."""
        set_recompute(self.encoder, enable)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return read_across(self.encoder)


class PyramidHead(nn.Module):
    """The pyramid, and one head for all of its maps."""

    def __init__(self, inside: int, stride: int, card: DetectCard) -> None:
        super().__init__()
        self.pyramid = SimplePyramid(inside, card.width, stride, card.strides)
        self.fcos = FCOSHead(card.width, num_anchors=1, num_classes=card.classes, num_convs=card.layers)

    def forward(self, last: Tensor) -> Answers:
        """What it says of each place of the maps that it makes of the last one, [B, inside, rows, columns]."""
        maps = self.pyramid(last)
        told = self.fcos(list(maps))
        places = places_of([(each.shape[2], each.shape[3]) for each in maps], self.pyramid.strides, last.device)
        return Answers(told["cls_logits"], told["bbox_regression"], told["bbox_ctrness"].squeeze(2), places)


def build_detector(encoder: nn.Module, card: dict[str, Any], head: dict[str, Any], where: str) -> Detector:
    """A detector on an encoder, or a model of timm, that was built from ``card``, with a fresh head as its card has it.

    ``where`` names the file of the cards in the sentence of a mistake. Errors: ExportError.
    """
    try:
        told, wanted = card_of(card, where), DetectCard.checked(head, f"{where}: head")
        still = unread(_look, told) if isinstance(told, BackboneCard) else ()
        return Detector(encoder, *_last_map(told), wanted, still)
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def check_detector(
    card: EncoderCard | BackboneCard, head: DetectCard, sides: tuple[int, int], images: int, *, train: bool
) -> None:
    """Refuse what a forward of so many images of (height, width) pixels would, in training or not. Errors: ConfigError."""
    inside, stride = _last_map(card)
    if 8 * head.strides[0] < stride or head.strides[-1] > max(sides):
        raise ConfigError(
            f"detect.strides={list(head.strides)} do not fit an encoder of {stride} pixels a place and images of "
            f"{times(sides)}: take none below {-(-stride // 8)} nor above {max(sides)}"
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = Detector(_built(card), inside, stride, head).train(train)
            model(torch.empty(images, card.channels, *sides))
        except REFUSALS as error:
            raise ConfigError(
                f"a detector of images of {times(card.image_size)} pixels cannot {'learn from' if train else 'evaluate'} "
                f"{images} at once of {times(sides)}: {said(error)}"
            ) from None


def _look(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (last_map(backbone, images),)


def _built(card: EncoderCard | BackboneCard) -> nn.Module:
    if isinstance(card, BackboneCard):
        return build_backbone(*card.shape)
    return build_encoder(card, image_size=card.image_size, channels=card.channels)


def _last_map(card: EncoderCard | BackboneCard) -> tuple[int, int]:
    """The width of an encoder's last map, and the pixels between its places.

    Errors: ConfigError for a model of timm without such a map.
    """
    if isinstance(card, EncoderCard):
        return card.width, card.patch
    _, (width, *sides) = shapes_of(*card.shape)
    told = getattr(backbone_outline(*card.shape), "feature_info", None)
    stride = told[-1]["reduction"] if told else height_and_width(card.image_size)[0] // sides[0]
    if sides != [-(-side // stride) for side in height_and_width(card.image_size)]:
        raise ConfigError(
            f"'{card.timm}' makes a map of {times((sides[0], sides[1]))} places of images of {times(card.image_size)} "
            f"pixels, which are not {stride} pixels apart; take another image size or model"
        )
    return width, stride
