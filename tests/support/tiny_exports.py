"""Tiny exports of every kind of model, written as a run writes them; the weights leave no part of a model silent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from encoders import shaken
from torch import nn

from foveal.models.backbone import backbone_card, backbone_from_card
from foveal.models.config import DetectionHeadCard, SegmentationHeadCard, VitConfig
from foveal.models.detect import build_detector
from foveal.models.segment import build_segmenter
from foveal.models.vit import encoder_card, encoder_from_card
from foveal.weights.export import Card, write_export

CLASSES = ("café, with a comma", "犬/dog", 'the "quoted"')
MEAN, STD = (0.48, 0.45, 0.4), (0.22, 0.23, 0.25)


def vit_card(
    name: str = "vit_tiny_patch16_224",
    size: int | tuple[int, int] = 16,
    *,
    pooling: Any = "token",
    classes: int = 0,
    **sizes: Any,
) -> dict[str, Any]:
    """The card of an encoder of one block of width 24 with patches of 4 pixels, unless ``sizes`` says otherwise."""
    cfg = VitConfig(**({"name": name, "patch": 4, "width": 24, "depth": 1, "heads": 2} | sizes))
    return encoder_card(cfg, size, 3, pooling=pooling, num_classes=classes)


def written(
    folder: Path,
    card: dict[str, Any],
    head: dict[str, Any] | None = None,
    *,
    std: float | None = None,
    named: bool = True,
) -> Path:
    """The export of a model with this encoder and, if there is a card of one, this head.

    std: of what is added to initial weights; None: they are drawn anew and large, by ``shaken``.
    named: whether the classes have names, as those of foreign heads have not.
    """
    torch.manual_seed(0)
    build: Callable[..., nn.Module] = backbone_from_card if "timm" in card else encoder_from_card
    encoder = build(card, "card.json")
    builders: dict[str, Callable[..., nn.Module]] = {"segmentation": build_segmenter, "detection": build_detector}
    model = encoder if head is None else builders[head["kind"]](encoder, card, head, "card.json")
    if std is None:
        shaken(model)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=std)
    has_classes = bool(card["classes"]) or head is not None
    names = CLASSES if has_classes and named else ()
    facts = Card("finetune", card, MEAN, STD, names, head=head, step=3, science={"data.channels": 3})
    own: Any = model
    write_export(folder, encoder.state_dict(), facts, None if head is None else own.head.state_dict())
    return folder


SEGMENTER = SegmentationHeadCard(head="pyramid", width=16, classes=3).to_dict()
DETECTOR = DetectionHeadCard(width=32, layers=1, strides=(4, 8), classes=3).to_dict()
# Kind of model: (encoder's card, head's card).
KINDS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any] | None]]] = {
    "plain": lambda: (vit_card(), None),
    "patches of 8, 16 x 24 pixels": lambda: (vit_card(size=(16, 24), patch=8), None),
    "pooled by the mean": lambda: (vit_card(pooling="avg"), None),
    "registers": lambda: (vit_card(registers=2, positions="learned"), None),
    "registers, layer scale": lambda: (vit_card("vit_small_patch14_reg4_dinov2", positions="learned"), None),
    "relative": lambda: (vit_card("vit_relpos_medium_patch16_cls_224", positions=None), None),
    "rotary": lambda: (vit_card("vit_small_patch16_rope_224", positions=None), None),
    "rotary, learned": lambda: (vit_card("vit_base_patch16_rope_mixed_224", positions=None), None),
    "EVA-02": lambda: (vit_card("eva02_tiny_patch14_224"), None),
    "CNN": lambda: (backbone_card("test_resnet", 32, 3), None),
    "classifier": lambda: (vit_card(classes=3), None),
    "classifier of the mean": lambda: (vit_card(pooling="avg", classes=3), None),
    "CNN classifier": lambda: (backbone_card("test_convnext", 32, 3, 3), None),
    "segmenter": lambda: (vit_card(), SEGMENTER),
    "CNN segmenter": lambda: (backbone_card("test_resnet", 64, 3), SEGMENTER),
    "detector": lambda: (vit_card(), DETECTOR),
}
