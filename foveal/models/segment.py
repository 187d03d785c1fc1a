"""Semantic segmentation: per-pixel logits from the feature maps of an encoder or a model of timm.

B images, C channels, H x W pixels, D width of a map, K classes.
"""

from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from foveal.config import height_and_width
from foveal.errors import ConfigError
from foveal.models.backbone import (
    TIMM_ERRORS,
    BackboneCard,
    FeatureFn,
    build_backbone,
    build_meta_backbone,
    format_error_one_line,
    format_image_size,
    forward_single_map,
    infer_pooled_map_shapes,
    parse_encoder_card,
)
from foveal.models.config import SegmentationHeadCard
from foveal.models.encoder_with_head import EncoderWithHead, set_noise_cast_images
from foveal.models.pyramid import DEFAULT_STRIDES, SimpleFeaturePyramid
from foveal.models.resize import resize_maps
from foveal.models.vit import HEAD_INIT_STD, EncoderCard, config_error_as_export


class Segmenter(EncoderWithHead):
    """An encoder, or a model of timm, with a head that gives every pixel logits."""

    def __init__(
        self, encoder: nn.Module, head: nn.Module, extract_maps: FeatureFn, unused_parameters: tuple[str, ...] = ()
    ) -> None:
        super().__init__(encoder, unused_parameters)
        self.head = head
        self._extract_maps = extract_maps

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """Return logits [B, K, H, W] of normalised images [B, C, H, W].

        ``drop_noise`` [B, drop paths] is uniform; see ``foveal.models.classify.Classifier.forward``.
        """
        maps = self._extract_maps(self.encoder, set_noise_cast_images(self.encoder, images, drop_noise))
        return resize_maps(self.head(maps), (images.shape[2], images.shape[3]))


class LastMapLinearHead(nn.Module):
    """A linear map from each location of the last map to logits (DINOv2's linear probe, 2023, without BatchNorm)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = _build_classifier_conv(in_channels, num_classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Return logits [B, K, rows, columns] of the last of the maps [B, D, rows, columns]."""
        return self.classify(maps[-1])


class PyramidSegmentationHead(nn.Module):
    """Maps of several strides, resized to the finest, summed and convolved (Kirillov et al., "Panoptic Feature Pyramid
    Networks", 2019, with one convolution instead of several). Norms are over channels.
    """

    def __init__(self, pyramid: nn.Module, width: int, num_classes: int) -> None:
        """``pyramid`` turns the last map (``SimpleFeaturePyramid``) or all maps into maps of ``width`` channels."""
        super().__init__()
        self.pyramid = pyramid
        self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(width)
        self.classify = _build_classifier_conv(width, num_classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Return logits [B, K, rows, columns] at the finest stride, of maps [B, D, rows, columns]."""
        total, *coarser_maps = self.pyramid(maps[-1] if isinstance(self.pyramid, SimpleFeaturePyramid) else maps)
        for coarser_map in coarser_maps:
            total = total + resize_maps(coarser_map, (total.shape[2], total.shape[3]))
        return self.classify(F.gelu(self.norm(self.smooth(total))))


class LateralConvs(nn.Module):
    """1 x 1 convolutions that bring the maps of a hierarchical network to one width."""

    def __init__(self, in_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(width, out_channels, 1, bias=False) for width in in_channels)
        self.norms = nn.ModuleList(LayerNorm2d(out_channels) for _ in in_channels)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return a map [B, out_channels, rows, columns] for each of the maps [B, D, rows, columns]."""
        layers = zip(self.norms, self.levels, maps, strict=True)
        return tuple(norm(level(feature_map)) for norm, level, feature_map in layers)


def build_segmenter(encoder: nn.Module, card: dict[str, Any], head_card: dict[str, Any], source: str) -> Segmenter:
    """Build a segmenter on an encoder, or a model of timm, that was built from ``card``, with a fresh head.

    The head is drawn from torch's global generator. ``source`` names the cards' file in error messages.
    Raises: ExportError if a card is invalid.
    """
    with config_error_as_export(source):
        encoder_card = parse_encoder_card(card, source)
        parsed_head_card = SegmentationHeadCard.from_dict(head_card, f"{source}: head")
        if isinstance(encoder_card, EncoderCard):
            head = _build_last_map_head(parsed_head_card, encoder_card.width, encoder_card.patch)
            return Segmenter(encoder, head, forward_single_map)
        extract_maps, head = _build_backbone_head(parsed_head_card, encoder_card)
        return Segmenter(encoder, head, extract_maps, find_unused_parameters(extract_maps, encoder_card))


def check_segmenter_training(card: BackboneCard, head_card: SegmentationHeadCard, microbatch_size: int) -> None:
    """Raise ConfigError if a training forward of a model of timm with this head fails, on the meta device."""
    infer_pooled_map_shapes(*card.build_args)  # raises ConfigError if there is no map
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        extract_maps, head = _build_backbone_head(head_card, card)
        model = Segmenter(build_backbone(*card.build_args), head, extract_maps)
        try:
            model(torch.empty(microbatch_size, card.channels, *height_and_width(card.image_size)))
        except TIMM_ERRORS as error:
            raise ConfigError(
                f"'{card.timm}' cannot train segmentation on a microbatch of {microbatch_size} images of "
                f"{format_image_size(card.image_size)} pixels: {format_error_one_line(error)}"
            ) from None


def _build_last_map_head(head_card: SegmentationHeadCard, in_channels: int, stride: int) -> nn.Module:
    if head_card.head == "linear":
        return LastMapLinearHead(in_channels, head_card.classes)
    return PyramidSegmentationHead(
        SimpleFeaturePyramid(in_channels, head_card.width, stride), head_card.width, head_card.classes
    )


def _build_backbone_head(head_card: SegmentationHeadCard, card: BackboneCard) -> tuple[FeatureFn, nn.Module]:
    """Return a function that extracts a timm model's maps, of several strides if possible, and a head for them."""
    _, (in_channels, rows, _) = infer_pooled_map_shapes(*card.build_args)
    stages = _get_stage_strides(*card.build_args) if head_card.head == "pyramid" else {}
    stage_indices = [index for index, (stride, _) in stages.items() if stride >= min(DEFAULT_STRIDES)]
    if len(stage_indices) < 2:
        stride = round(height_and_width(card.image_size)[0] / rows)
        return forward_single_map, _build_last_map_head(head_card, in_channels, stride)

    def extract_maps(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            backbone.forward_intermediates(images, indices=stage_indices, output_fmt="NCHW", intermediates_only=True)
        )

    laterals = LateralConvs(tuple(stages[index][1] for index in stage_indices), head_card.width)
    return extract_maps, PyramidSegmentationHead(laterals, head_card.width, head_card.classes)


def _get_stage_strides(name: str, image_size: int | tuple[int, int], channels: int) -> dict[int, tuple[int, int]]:
    """Return (stride in pixels, width) of the last map of each stride, by timm's index; empty if timm has none."""
    backbone = build_meta_backbone(name, image_size, channels)
    stages = getattr(backbone, "feature_info", ()) if hasattr(backbone, "forward_intermediates") else ()
    last_by_stride = {stage["reduction"]: (index, stage["num_chs"]) for index, stage in enumerate(stages)}
    return {index: (stride, width) for stride, (index, width) in last_by_stride.items()}


def find_unused_parameters(extract_maps: FeatureFn, card: BackboneCard) -> tuple[str, ...]:
    """Return the names of a timm model's parameters that no map depends on, such as those of its pooling.

    They must be frozen: an engine that reduces gradients would wait for their gradients.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.enable_grad():
        backbone = build_backbone(*card.build_args).eval()
        maps = extract_maps(backbone, torch.empty(2, card.channels, *height_and_width(card.image_size)))
        total = torch.stack([feature_map.sum() for feature_map in maps]).sum()
        names, parameters = zip(*backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _build_classifier_conv(in_channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1 x 1 convolution whose logits start near 0, as a classifier's do."""
    layer = nn.Conv2d(in_channels, num_classes, 1)
    trunc_normal_(layer.weight, std=HEAD_INIT_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
