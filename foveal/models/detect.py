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
    TIMM_ERRORS,
    BackboneCard,
    build_backbone,
    build_meta_backbone,
    format_error,
    format_image_size,
    forward_feature_map,
    infer_feature_shapes,
    parse_encoder_card,
    set_activation_checkpointing,
)
from foveal.models.droppath import set_drop_path_noise
from foveal.models.fcos import FCOSOutput, compute_locations
from foveal.models.pyramid import SimpleFeaturePyramid
from foveal.models.segment import find_unused_parameters
from foveal.models.token_positions import find_cross_module_parameters, set_visible_indices
from foveal.models.vit import EncoderCard, build_encoder


class DetectorConfig(Config):
    """What of a detector stands on its encoder."""

    width: int = science(256, "Channels of the pyramid's maps and of the head on them.", ge=32, multiple_of=32)
    layers: int = science(4, "Convolutions of each of the head's two branches before their last.", ge=1)
    strides: tuple[int, ...] = science(
        (8, 16, 32, 64), "Pixels between the places of each map: powers of two times the encoder's.", min_length=1
    )

    @model_validator(mode="after")
    def _check_strides(self) -> Self:
        for one, other in itertools.pairwise(self.strides):
            if other <= one or other % one or (other // one).bit_count() != 1:
                raise ValueError(f"strides={list(self.strides)}: each must be the one before times 2, 4, 8, ...")
        return self


class DetectionHeadCard(DetectorConfig):
    """What it takes to build the pyramid and head of a detector again, beside the card of what they stand on."""

    kind: Literal["detection"] = science("detection", "what kind of head it is")
    classes: int = science(description="classes of its boxes", ge=1)


class Detector(nn.Module):
    """What Li et al. ("Exploring plain vision transformer backbones for object detection", 2022) put on a plain encoder.

    Their pyramid is of the last map alone; the head is torchvision's of FCOS, whose norms are over groups of channels,
    so that no image depends on another. The last map is the encoder's after its last norm.
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_channels: int,
        stride: int,
        head_card: DetectionHeadCard,
        unused_parameters: tuple[str, ...] = (),
    ) -> None:
        """``inside`` and ``stride`` are the width of the encoder's last map and the pixels between its places.

        What no map depends on (``still``: names of the encoder's parameters) learns nothing. The head is drawn from
        torch's global generator, after the encoder (``build_encoder``).
        """
        super().__init__()
        self.encoder = encoder
        for name in unused_parameters:
            encoder.get_parameter(name).requires_grad_(False)
        self.head = FCOSPyramidHead(in_channels, stride, head_card)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> FCOSOutput:
        """What the head says of normalised images [B, C, H, W]; ``noise`` as in ``foveal.models.classify.Classifier``."""
        set_drop_path_noise(self.encoder, drop_noise)
        set_visible_indices(self.encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        return self.head(forward_feature_map(self.encoder, images.to(next(self.encoder.parameters()).dtype)))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the encoder's blocks in the backward pass. Raises: ConfigError where timm cannot."""
        set_activation_checkpointing(self.encoder, enable)

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return find_cross_module_parameters(self.encoder)


class FCOSPyramidHead(nn.Module):
    """The pyramid, and one head for all of its maps."""

    def __init__(self, in_channels: int, stride: int, card: DetectionHeadCard) -> None:
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(in_channels, card.width, stride, card.strides)
        self.fcos = FCOSHead(card.width, num_anchors=1, num_classes=card.classes, num_convs=card.layers)

    def forward(self, feature_map: Tensor) -> FCOSOutput:
        """What it says of each place of the maps that it makes of the last one, [B, inside, rows, columns]."""
        maps = self.pyramid(feature_map)
        told = self.fcos(list(maps))
        places = compute_locations(
            [(each.shape[2], each.shape[3]) for each in maps], self.pyramid.strides, feature_map.device
        )
        return FCOSOutput(told["cls_logits"], told["bbox_regression"], told["bbox_ctrness"].squeeze(2), places)


def build_detector(encoder: nn.Module, card: dict[str, Any], head_card: dict[str, Any], where: str) -> Detector:
    """A detector on an encoder, or a model of timm, that was built from ``card``, with a fresh head as its card has it.

    ``where`` names the file of the cards in the sentence of a mistake. Raises: ExportError.
    """
    try:
        told, wanted = parse_encoder_card(card, where), DetectionHeadCard.from_dict(head_card, f"{where}: head")
        still = find_unused_parameters(_forward_map_only, told) if isinstance(told, BackboneCard) else ()
        return Detector(encoder, *_map_width_and_stride(told), wanted, still)
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def check_detector(
    card: EncoderCard | BackboneCard,
    head_card: DetectionHeadCard,
    image_size: tuple[int, int],
    num_images: int,
    *,
    train: bool,
) -> None:
    """Refuse what a forward of so many images of (height, width) pixels would, in training or not. Raises: ConfigError."""
    inside, stride = _map_width_and_stride(card)
    if 8 * head_card.strides[0] < stride or head_card.strides[-1] > max(image_size):
        raise ConfigError(
            f"detect.strides={list(head_card.strides)} do not fit an encoder of {stride} pixels a place and images of "
            f"{format_image_size(image_size)}: take none below {-(-stride // 8)} nor above {max(image_size)}"
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = Detector(_build_encoder(card), inside, stride, head_card).train(train)
            model(torch.empty(num_images, card.channels, *image_size))
        except TIMM_ERRORS as error:
            raise ConfigError(
                f"a detector of images of {format_image_size(card.image_size)} pixels cannot {'learn from' if train else 'evaluate'} "
                f"{num_images} at once of {format_image_size(image_size)}: {format_error(error)}"
            ) from None


def _forward_map_only(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (forward_feature_map(backbone, images),)


def _build_encoder(card: EncoderCard | BackboneCard) -> nn.Module:
    if isinstance(card, BackboneCard):
        return build_backbone(*card.build_args)
    return build_encoder(card, image_size=card.image_size, channels=card.channels)


def _map_width_and_stride(card: EncoderCard | BackboneCard) -> tuple[int, int]:
    """The width of an encoder's last map, and the pixels between its places.

    Raises: ConfigError for a model of timm without such a map.
    """
    if isinstance(card, EncoderCard):
        return card.width, card.patch
    _, (width, *sides) = infer_feature_shapes(*card.build_args)
    told = getattr(build_meta_backbone(*card.build_args), "feature_info", None)
    stride = told[-1]["reduction"] if told else height_and_width(card.image_size)[0] // sides[0]
    if sides != [-(-side // stride) for side in height_and_width(card.image_size)]:
        raise ConfigError(
            f"'{card.timm}' makes a map of {format_image_size((sides[0], sides[1]))} places of images of {format_image_size(card.image_size)} "
            f"pixels, which are not {stride} pixels apart; take another image size or model"
        )
    return width, stride
