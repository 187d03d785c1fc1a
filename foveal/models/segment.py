"""Semantic segmentation: a class for every pixel, from the map or the maps that an encoder or a model of timm makes.

B images, C channels, H x W their pixels, D width of a map, K classes.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

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
from foveal.models.pyramid import DEFAULT_STRIDES, SimpleFeaturePyramid
from foveal.models.resize import resize_maps
from foveal.models.token_positions import find_cross_module_parameters, set_visible_indices
from foveal.models.vit import HEAD_INIT_STD, EncoderCard

SegmentationHeadKind = Literal["linear", "pyramid"]
FeatureFn = Callable[[Any, Tensor], tuple[Tensor, ...]]


class SegmentationHeadCard(Config):
    """What it takes to build the head of a segmentation again, beside the card of what it stands on."""

    kind: Literal["segmentation"] = science("segmentation", "what kind of head it is")
    head: SegmentationHeadKind = science(description="a linear map of the last map's places, or a pyramid of maps")
    width: int = science(description="numbers per place of the pyramid's maps", ge=1)
    classes: int = science(description="its outputs", ge=1)


class Segmenter(nn.Module):
    """An encoder of foveal's or a model of timm, and a head that gives every pixel a class.

    What the head does not read of a model of timm (``still``: names of parameters) learns nothing.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, extract_maps: FeatureFn, unused_parameters: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._extract_maps = extract_maps
        for name in unused_parameters:
            encoder.get_parameter(name).requires_grad_(False)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W] of normalised images [B, C, H, W]; ``noise`` as ``foveal.models.classify.Classifier`` takes it."""
        set_drop_path_noise(self.encoder, drop_noise)
        set_visible_indices(self.encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        maps = self._extract_maps(self.encoder, images.to(next(self.encoder.parameters()).dtype))
        return resize_maps(self.head(maps), (images.shape[2], images.shape[3]))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the encoder's blocks in the backward pass. Raises: ConfigError where timm cannot."""
        set_activation_checkpointing(self.encoder, enable)

    def external_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return find_cross_module_parameters(self.encoder)


class LinearSegmentationHead(nn.Module):
    """One linear map from each place of the last map to logits (as DINOv2's linear probe, 2023, without its BatchNorm)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.classify = _build_classifier_conv(in_channels, num_classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, K, rows, columns] of the last of the maps [B, D, rows, columns]."""
        return self.classify(maps[-1])


class PyramidSegmentationHead(nn.Module):
    """Maps of several strides brought to the finest, summed, and looked at once more (Kirillov et al., "Panoptic feature
    pyramid networks", 2019, with one convolution where they have several). Norms are over channels.
    """

    def __init__(self, pyramid: nn.Module, width: int, num_classes: int) -> None:
        """``pyramid`` makes maps of one width of the encoder's: of the last alone (``SimplePyramid``), or of each one."""
        super().__init__()
        self.pyramid = pyramid
        self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(width)
        self.classify = _build_classifier_conv(width, num_classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, K, rows, columns] at the finest stride, of maps [B, D, rows, columns]."""
        finest, *coarser = self.pyramid(maps[-1] if isinstance(self.pyramid, SimpleFeaturePyramid) else maps)
        for each in coarser:
            finest = finest + resize_maps(each, (finest.shape[2], finest.shape[3]))
        return self.classify(F.gelu(self.norm(self.smooth(finest))))


class LateralConvs(nn.Module):
    """The maps of a hierarchical network, each brought to one width."""

    def __init__(self, in_channels: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(inside, out_channels, 1, bias=False) for inside in in_channels)
        self.norms = nn.ModuleList(LayerNorm2d(out_channels) for _ in in_channels)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps [B, width, rows, columns], one for each of the maps [B, D, rows, columns]."""
        return tuple(norm(level(each)) for norm, level, each in zip(self.norms, self.levels, maps, strict=True))


def build_segmenter(encoder: nn.Module, card: dict[str, Any], head_card: dict[str, Any], where: str) -> Segmenter:
    """A segmenter on an encoder, or a model of timm, that was built from ``card``, with a fresh head as its card has it.

    The head is drawn from torch's global generator. ``where`` names the file of the cards. Raises: ExportError.
    """
    try:
        told, wanted = parse_encoder_card(card, where), SegmentationHeadCard.from_dict(head_card, f"{where}: head")
        if isinstance(told, EncoderCard):
            return Segmenter(encoder, _build_last_map_head(wanted, told.width, told.patch), _forward_map_only)
        look, made = _build_backbone_head(wanted, told)
        return Segmenter(encoder, made, look, find_unused_parameters(look, told))
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def check_segmenter_training(card: BackboneCard, head_card: SegmentationHeadCard, microbatch_size: int) -> None:
    """Refuse what a training forward of a model of timm with such a head would. Raises: ConfigError."""
    infer_feature_shapes(*card.build_args)  # it has a map, or says so
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        look, made = _build_backbone_head(head_card, card)
        model = Segmenter(build_backbone(*card.build_args), made, look)
        try:
            model(torch.empty(microbatch_size, card.channels, *height_and_width(card.image_size)))
        except TIMM_ERRORS as error:
            raise ConfigError(
                f"'{card.timm}' cannot learn to segment from {microbatch_size} images at once of {format_image_size(card.image_size)} "
                f"pixels: {format_error(error)}"
            ) from None


def _build_last_map_head(head_card: SegmentationHeadCard, in_channels: int, stride: int) -> nn.Module:
    if head_card.head == "linear":
        return LinearSegmentationHead(in_channels, head_card.classes)
    return PyramidSegmentationHead(
        SimpleFeaturePyramid(in_channels, head_card.width, stride), head_card.width, head_card.classes
    )


def _build_backbone_head(head_card: SegmentationHeadCard, card: BackboneCard) -> tuple[FeatureFn, nn.Module]:
    """The head on a model of timm, and what it reads: maps of several strides where it has them."""
    _, (inside, rows, _) = infer_feature_shapes(*card.build_args)
    stages = _get_stage_strides(*card.build_args) if head_card.head == "pyramid" else {}
    wanted = [number for number, (stride, _) in stages.items() if stride >= min(DEFAULT_STRIDES)]
    if len(wanted) < 2:
        return _forward_map_only, _build_last_map_head(
            head_card, inside, round(height_and_width(card.image_size)[0] / rows)
        )

    def look(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(backbone.forward_intermediates(images, indices=wanted, output_fmt="NCHW", intermediates_only=True))

    laterals = LateralConvs(tuple(stages[number][1] for number in wanted), head_card.width)
    return look, PyramidSegmentationHead(laterals, head_card.width, head_card.classes)


def _forward_map_only(encoder: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (forward_feature_map(encoder, images),)


def _get_stage_strides(name: str, image_size: int | tuple[int, int], channels: int) -> dict[int, tuple[int, int]]:
    """The (stride in pixels, width) of the last map of each stride that a model tells, by timm's number of it.

    Nothing where timm cannot give them.
    """
    backbone = build_meta_backbone(name, image_size, channels)
    told = getattr(backbone, "feature_info", ()) if hasattr(backbone, "forward_intermediates") else ()
    last = {each["reduction"]: (number, each["num_chs"]) for number, each in enumerate(told)}
    return {number: (stride, width) for stride, (number, width) in last.items()}


def find_unused_parameters(extract_maps: FeatureFn, card: BackboneCard) -> tuple[str, ...]:
    """The parameters of a model of timm that no map depends on, such as those of its pooling: an engine that reduces
    gradients would wait for theirs.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.enable_grad():
        backbone = build_backbone(*card.build_args).eval()
        maps = extract_maps(backbone, torch.empty(2, card.channels, *height_and_width(card.image_size)))
        total = torch.stack([each.sum() for each in maps]).sum()
        names, parameters = zip(*backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _build_classifier_conv(in_channels: int, num_classes: int) -> nn.Conv2d:
    """It starts nearly indifferent, as the head of a classifier does."""
    layer = nn.Conv2d(in_channels, num_classes, 1)
    trunc_normal_(layer.weight, std=HEAD_INIT_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
