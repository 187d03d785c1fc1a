"""A detector: an encoder or a model of timm, a feature pyramid, and FCOS's head on each of its maps. B images."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead

from foveal.config import height_and_width
from foveal.errors import ConfigError
from foveal.models.backbone import (
    TIMM_ERRORS,
    BackboneCard,
    build_backbone,
    build_meta_backbone,
    format_error_one_line,
    format_image_size,
    forward_feature_map,
    forward_single_map,
    infer_pooled_map_shapes,
    parse_encoder_card,
)
from foveal.models.config import DetectionHeadCard
from foveal.models.encoder_with_head import EncoderWithHead, set_noise_cast_images
from foveal.models.fcos import FCOSOutput, compute_locations_with_strides
from foveal.models.pyramid import SimpleFeaturePyramid
from foveal.models.segment import find_unused_parameters
from foveal.models.vit import EncoderCard, build_encoder, config_error_as_export


class Detector(EncoderWithHead):
    """FCOS on ViTDet's pyramid (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022).

    The pyramid is computed from the encoder's last map after its last norm. The head is torchvision's FCOS head, whose
    norms are over groups of channels, so that no image depends on another.
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_channels: int,
        in_stride: int,
        head_card: DetectionHeadCard,
        unused_parameters: tuple[str, ...] = (),
    ) -> None:
        """``in_channels`` and ``stride`` (pixels) are those of the encoder's last map.

        The head is drawn from torch's global generator, after the encoder (``build_encoder``).
        """
        super().__init__(encoder, unused_parameters)
        self.head = FCOSPyramidHead(in_channels, in_stride, head_card)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> FCOSOutput:
        """Return the head's output for normalised images [B, C, H, W].

        ``drop_noise`` [B, drop paths] is uniform; see ``foveal.models.classify.Classifier.forward``.
        """
        return self.head(forward_feature_map(self.encoder, set_noise_cast_images(self.encoder, images, drop_noise)))


class FCOSPyramidHead(nn.Module):
    """The pyramid, and a head shared by its maps."""

    def __init__(self, in_channels: int, in_stride: int, head_card: DetectionHeadCard) -> None:
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(in_channels, head_card.width, in_stride, head_card.strides)
        self.fcos = FCOSHead(head_card.width, num_anchors=1, num_classes=head_card.classes, num_convs=head_card.layers)

    def forward(self, feature_map: Tensor) -> FCOSOutput:
        """Return the output at each location of the pyramid on a map [B, in_channels, rows, columns]."""
        maps = self.pyramid(feature_map)
        output = self.fcos(list(maps))
        map_sizes = [(level_map.shape[2], level_map.shape[3]) for level_map in maps]
        locations = compute_locations_with_strides(map_sizes, self.pyramid.strides, feature_map.device)
        return FCOSOutput(output["cls_logits"], output["bbox_regression"], output["bbox_ctrness"].squeeze(2), locations)


def build_detector(encoder: nn.Module, card: dict[str, Any], head_card: dict[str, Any], source: str) -> Detector:
    """Build a detector on an encoder, or a model of timm, that was built from ``card``, with a fresh head.

    ``source`` names the cards' file in error messages. Raises: ExportError if a card is invalid.
    """
    with config_error_as_export(source):
        encoder_card = parse_encoder_card(card, source)
        parsed_head_card = DetectionHeadCard.from_dict(head_card, f"{source}: head")
        unused_parameters = ()
        if isinstance(encoder_card, BackboneCard):
            unused_parameters = find_unused_parameters(forward_single_map, encoder_card)
        return Detector(encoder, *_map_width_and_stride(encoder_card), parsed_head_card, unused_parameters)


def check_detector_meta_forward(
    card: EncoderCard | BackboneCard,
    head_card: DetectionHeadCard,
    image_hw: tuple[int, int],
    num_images: int,
    *,
    train: bool,
) -> None:
    """Raise ConfigError if a forward of ``num_images`` images of (height, width) pixels fails, on the meta device."""
    in_channels, stride = _map_width_and_stride(card)
    if 8 * head_card.strides[0] < stride or head_card.strides[-1] > max(image_hw):
        raise ConfigError(
            f"detect.strides={list(head_card.strides)} do not fit an encoder of stride {stride} and images of "
            f"{format_image_size(image_hw)} pixels: use strides from {-(-stride // 8)} to {max(image_hw)}"
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = Detector(_build_encoder(card), in_channels, stride, head_card).train(train)
            model(torch.empty(num_images, card.channels, *image_hw))
        except TIMM_ERRORS as error:
            action = "train on" if train else "evaluate"
            raise ConfigError(
                f"a detector of images of {format_image_size(card.image_size)} pixels cannot {action} a microbatch of "
                f"{num_images} images of {format_image_size(image_hw)} pixels: {format_error_one_line(error)}"
            ) from None


def _build_encoder(card: EncoderCard | BackboneCard) -> nn.Module:
    if isinstance(card, BackboneCard):
        return build_backbone(*card.build_args)
    return build_encoder(card, image_size=card.image_size, channels=card.channels)


def _map_width_and_stride(card: EncoderCard | BackboneCard) -> tuple[int, int]:
    """Return the width and stride (pixels) of an encoder's last map.

    Raises: ConfigError if a model of timm has no such map.
    """
    if isinstance(card, EncoderCard):
        return card.width, card.patch
    _, (width, *sides) = infer_pooled_map_shapes(*card.build_args)
    stages = getattr(build_meta_backbone(*card.build_args), "feature_info", None)
    stride = stages[-1]["reduction"] if stages else height_and_width(card.image_size)[0] // sides[0]
    if sides != [-(-side // stride) for side in height_and_width(card.image_size)]:
        raise ConfigError(
            f"'{card.timm}' makes a map of {format_image_size((sides[0], sides[1]))} locations of images of "
            f"{format_image_size(card.image_size)} pixels, which does not match its stride of {stride} pixels; use "
            "another image size or model"
        )
    return width, stride
