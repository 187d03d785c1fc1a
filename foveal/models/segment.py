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
from foveal.models.pyramid import STRIDES, SimplePyramid
from foveal.models.resize import upsampled
from foveal.models.token_positions import read_across, set_kept
from foveal.models.vit import HEAD_SCALE, EncoderCard

SegmentHead = Literal["linear", "pyramid"]
Look = Callable[[Any, Tensor], tuple[Tensor, ...]]


class SegmentCard(Config):
    """What it takes to build the head of a segmentation again, beside the card of what it stands on."""

    kind: Literal["segmentation"] = science("segmentation", "what kind of head it is")
    head: SegmentHead = science(about="a linear map of the last map's places, or a pyramid of maps")
    width: int = science(about="numbers per place of the pyramid's maps", ge=1)
    classes: int = science(about="its outputs", ge=1)


class Segmenter(nn.Module):
    """An encoder of foveal's or a model of timm, and a head that gives every pixel a class.

    What the head does not read of a model of timm (``still``: names of parameters) learns nothing.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, look: Look, still: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._look = look
        for name in still:
            encoder.get_parameter(name).requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W] of normalised images [B, C, H, W]; ``noise`` as ``foveal.models.classify.Classifier`` takes it."""
        set_drops(self.encoder, noise)
        set_kept(self.encoder, None)
        # An engine may have lowered the weights; under autocast they are float32.
        maps = self._look(self.encoder, images.to(next(self.encoder.parameters()).dtype))
        return upsampled(self.head(maps), (images.shape[2], images.shape[3]))

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Recompute the encoder's blocks in the backward pass. Errors: ConfigError where timm cannot."""
        set_recompute(self.encoder, enable)

    def borrowed_parameters(self) -> list[nn.Parameter]:
        """The parameters that a part of the encoder reads in another one (see ``foveal.models.encode``)."""
        return read_across(self.encoder)


class LinearHead(nn.Module):
    """One linear map from each place of the last map to logits (as DINOv2's linear probe, 2023, without its BatchNorm)."""

    def __init__(self, inside: int, classes: int) -> None:
        super().__init__()
        self.classify = _classify(inside, classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, K, rows, columns] of the last of the maps [B, D, rows, columns]."""
        return self.classify(maps[-1])


class PyramidHead(nn.Module):
    """Maps of several strides brought to the finest, summed, and looked at once more (Kirillov et al., "Panoptic feature
    pyramid networks", 2019, with one convolution where they have several). Norms are over channels.
    """

    def __init__(self, pyramid: nn.Module, width: int, classes: int) -> None:
        """``pyramid`` makes maps of one width of the encoder's: of the last alone (``SimplePyramid``), or of each one."""
        super().__init__()
        self.pyramid = pyramid
        self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(width)
        self.classify = _classify(width, classes)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Logits [B, K, rows, columns] at the finest stride, of maps [B, D, rows, columns]."""
        finest, *coarser = self.pyramid(maps[-1] if isinstance(self.pyramid, SimplePyramid) else maps)
        for each in coarser:
            finest = finest + upsampled(each, (finest.shape[2], finest.shape[3]))
        return self.classify(F.gelu(self.norm(self.smooth(finest))))


class Laterals(nn.Module):
    """The maps of a hierarchical network, each brought to one width."""

    def __init__(self, widths: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(inside, width, 1, bias=False) for inside in widths)
        self.norms = nn.ModuleList(LayerNorm2d(width) for _ in widths)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps [B, width, rows, columns], one for each of the maps [B, D, rows, columns]."""
        return tuple(norm(level(each)) for norm, level, each in zip(self.norms, self.levels, maps, strict=True))


def build_segmenter(encoder: nn.Module, card: dict[str, Any], head: dict[str, Any], where: str) -> Segmenter:
    """A segmenter on an encoder, or a model of timm, that was built from ``card``, with a fresh head as its card has it.

    The head is drawn from torch's global generator. ``where`` names the file of the cards. Errors: ExportError.
    """
    try:
        told, wanted = card_of(card, where), SegmentCard.checked(head, f"{where}: head")
        if isinstance(told, EncoderCard):
            return Segmenter(encoder, _on_one_map(wanted, told.width, told.patch), _last)
        look, made = _on_backbone(wanted, told)
        return Segmenter(encoder, made, look, unread(look, told))
    except ConfigError as error:
        sentence = str(error)
        raise ExportError(sentence if sentence.startswith(where) else f"{where}: {sentence}") from None


def check_segmenter(card: BackboneCard, head: SegmentCard, at_once: int) -> None:
    """Refuse what a training forward of a model of timm with such a head would. Errors: ConfigError."""
    shapes_of(*card.shape)  # it has a map, or says so
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        look, made = _on_backbone(head, card)
        model = Segmenter(build_backbone(*card.shape), made, look)
        try:
            model(torch.empty(at_once, card.channels, *height_and_width(card.image_size)))
        except REFUSALS as error:
            raise ConfigError(
                f"'{card.timm}' cannot learn to segment from {at_once} images at once of {times(card.image_size)} "
                f"pixels: {said(error)}"
            ) from None


def _on_one_map(head: SegmentCard, inside: int, stride: int) -> nn.Module:
    if head.head == "linear":
        return LinearHead(inside, head.classes)
    return PyramidHead(SimplePyramid(inside, head.width, stride), head.width, head.classes)


def _on_backbone(head: SegmentCard, card: BackboneCard) -> tuple[Look, nn.Module]:
    """The head on a model of timm, and what it reads: maps of several strides where it has them."""
    _, (inside, rows, _) = shapes_of(*card.shape)
    stages = _stages(*card.shape) if head.head == "pyramid" else {}
    wanted = [number for number, (stride, _) in stages.items() if stride >= min(STRIDES)]
    if len(wanted) < 2:
        return _last, _on_one_map(head, inside, round(height_and_width(card.image_size)[0] / rows))

    def look(backbone: Any, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(backbone.forward_intermediates(images, indices=wanted, output_fmt="NCHW", intermediates_only=True))

    laterals = Laterals(tuple(stages[number][1] for number in wanted), head.width)
    return look, PyramidHead(laterals, head.width, head.classes)


def _last(encoder: Any, images: Tensor) -> tuple[Tensor, ...]:
    return (last_map(encoder, images),)


def _stages(name: str, image_size: int | tuple[int, int], channels: int) -> dict[int, tuple[int, int]]:
    """The (stride in pixels, width) of the last map of each stride that a model tells, by timm's number of it.

    Nothing where timm cannot give them.
    """
    backbone = backbone_outline(name, image_size, channels)
    told = getattr(backbone, "feature_info", ()) if hasattr(backbone, "forward_intermediates") else ()
    last = {each["reduction"]: (number, each["num_chs"]) for number, each in enumerate(told)}
    return {number: (stride, width) for stride, (number, width) in last.items()}


def unread(look: Look, card: BackboneCard) -> tuple[str, ...]:
    """The parameters of a model of timm that no map depends on, such as those of its pooling: an engine that reduces
    gradients would wait for theirs.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.enable_grad():
        backbone = build_backbone(*card.shape).eval()
        maps = look(backbone, torch.empty(2, card.channels, *height_and_width(card.image_size)))
        total = torch.stack([each.sum() for each in maps]).sum()
        names, parameters = zip(*backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return tuple(name for name, gradient in zip(names, gradients, strict=True) if gradient is None)


def _classify(inside: int, classes: int) -> nn.Conv2d:
    """It starts nearly indifferent, as the head of a classifier does."""
    layer = nn.Conv2d(inside, classes, 1)
    trunc_normal_(layer.weight, std=HEAD_SCALE)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
