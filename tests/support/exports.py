"""Small exports of every kind, of random weights that tell images apart, and images to predict on."""

from pathlib import Path
from typing import Any

import torch
from encoders import shaken
from pictures import photo

from foveal.models.backbone import backbone_card, build_backbone
from foveal.models.config import DetectionHeadCard, Pooling, SegmentationHeadCard, VitConfig
from foveal.models.detect import build_detector
from foveal.models.segment import build_segmenter
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=32, depth=2, heads=2)
SIDE = 16
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
# Names that a format of tables may damage.
ODD_CLASSES = ('a "quoted" one', "comma, semicolon;", "sla/sh\\es", "two\nlines\r", "犬 сова é", " spaces ", "=1+1")
DATA = {"data.image_size": SIDE, "data.eval_crop_ratio": 1.0, "data.decode_version": 2}


def export_encoder(folder: Path, *, pooling: Pooling = "token", cfg: VitConfig = TINY) -> Path:
    """An encoder without a head."""
    torch.manual_seed(0)
    encoder = build_encoder(cfg, image_size=SIDE, channels=3, pooling=pooling)
    shaken(encoder)
    card = encoder_card(cfg, SIDE, 3, pooling=pooling)
    write_export(folder, encoder.state_dict(), Card("pretrain", card, MEAN, STD, science=DATA))
    return folder


def export_backbone(folder: Path, name: str = "test_resnet") -> Path:
    """A model of timm without a head."""
    torch.manual_seed(0)
    model = build_backbone(name, image_size=32, channels=3)
    write_export(folder, model.state_dict(), Card("finetune", backbone_card(name, 32, 3), MEAN, STD))
    return folder


def export_classifier(
    folder: Path,
    classes: tuple[str, ...] = ODD_CLASSES,
    *,
    task: str = "classification",
    pooling: Pooling = "avg",
    cfg: VitConfig = TINY,
) -> Path:
    """An encoder with a head of its own."""
    torch.manual_seed(1)
    num = len(classes)
    encoder = build_encoder(cfg, image_size=SIDE, channels=3, pooling=pooling, num_classes=num)
    shaken(encoder)
    card = encoder_card(cfg, SIDE, 3, pooling=pooling, num_classes=num)
    science = DATA | {"task": task}
    write_export(folder, encoder.state_dict(), Card("finetune", card, MEAN, STD, classes=classes, science=science))
    return folder


def export_segmenter(folder: Path, classes: tuple[str, ...] = ODD_CLASSES) -> Path:
    """A segmenter that sees images of 24 x 32 pixels in windows of 16."""
    head = SegmentationHeadCard(head="linear", width=8, classes=len(classes)).to_dict()
    science = DATA | {"data.eval_size": [24, 32], "segment.stride": 0.5}
    return _export_with_head(folder, build_segmenter, head, classes, science)


def export_detector(folder: Path, classes: tuple[str, ...] = ODD_CLASSES) -> Path:
    """A detector."""
    head = DetectionHeadCard(width=32, layers=1, strides=(4, 8), classes=len(classes)).to_dict()
    return _export_with_head(folder, build_detector, head, classes, DATA)


def _export_with_head(
    folder: Path, build: Any, head: dict[str, Any], classes: tuple[str, ...], science: dict[str, Any]
) -> Path:
    torch.manual_seed(2)
    encoder, card = build_encoder(TINY, image_size=SIDE, channels=3), encoder_card(TINY, SIDE, 3)
    model = build(encoder, card, head, "here")
    shaken(model)
    full_card = Card("finetune", card, MEAN, STD, classes=classes, science=science, head=head)
    write_export(folder, encoder.state_dict(), full_card, model.head.state_dict())
    return folder


def write_photos(folder: Path, count: int = 5, size: tuple[int, int] = (40, 32)) -> list[Path]:
    """Images as JPEG and PNG: parts of one picture, shifted and tinted, so that each has features of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(count):
        shifted = photo(size[0] + 8 * count, size[1]).crop((8 * number, 0, 8 * number + size[0], size[1]))
        tinted = shifted.point([min(255, int(value * (0.4 + number / count))) for value in range(256)] * 3)
        files.append(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
        tinted.save(files[-1])
    return files
