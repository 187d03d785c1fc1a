"""Segmenters: encoders and models of timm with both heads, sliding windows and bilinear resizing."""

import numpy as np
import pytest
import torch
from encoders import KINDS, encoder_of, shaken
from torch.nn import functional as F

from foveal.models.backbone import BackboneCard, build_backbone
from foveal.models.config import SegmentationHeadCard, SegmentationHeadKind, VitConfig
from foveal.models.encode import encode_cls_and_patches
from foveal.models.resize import resize_maps
from foveal.models.segment import LateralConvs, Segmenter, build_segmenter
from foveal.models.sliding_window import iter_sliding_window_log_probs, window_top_lefts
from foveal.models.timm_vit import Encoder
from foveal.models.vit import encoder_card

SIZE = (16, 24)
HEADS: list[SegmentationHeadKind] = ["linear", "pyramid"]


def segmenter(encoder: Encoder, name: str, positions: object, head: SegmentationHeadKind) -> Segmenter:
    cfg = VitConfig.from_dict(
        {"name": name, "patch": 4, "width": 48, "depth": 2, "heads": 3, "positions": positions}, "here"
    )
    head_card = SegmentationHeadCard(head=head, width=16, classes=5)
    return build_segmenter(encoder, encoder_card(cfg, SIZE, 3), head_card.to_dict(), "here")


@pytest.mark.parametrize(("name", "positions"), [KINDS[0], KINDS[4], KINDS[-4], KINDS[-1]])
@pytest.mark.parametrize("head", HEADS)
def test_an_encoder_of_any_kind_gives_every_pixel_its_logits(
    name: str, positions: object, head: SegmentationHeadKind
) -> None:
    encoder = encoder_of(name, positions, SIZE)  # type: ignore[arg-type]
    model = segmenter(encoder, name, positions, head)
    shaken(model.head)
    classify = model.head.get_submodule("classify")
    images = torch.randn(2, 3, *SIZE)
    logits = model.eval()(images)
    assert logits.shape == (2, 5, *SIZE)
    if head == "linear":
        feature_map = encode_cls_and_patches(encoder, images)[1].transpose(1, 2).unflatten(2, (4, 6))
        expected = F.interpolate(classify(feature_map), size=SIZE, mode="bilinear")
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name, parameter in trainable if parameter.grad is None]


@pytest.mark.parametrize(
    ("name", "head", "unused"),
    [
        ("test_resnet", "linear", ()),
        ("test_resnet", "pyramid", ()),
        ("swin_tiny_patch4_window7_224", "linear", ()),
        ("swin_tiny_patch4_window7_224", "pyramid", ("norm.weight", "norm.bias")),
        ("convnext_atto", "linear", ("head.norm.weight", "head.norm.bias")),
        ("test_vit", "pyramid", ()),
    ],
)
def test_a_model_of_timm_learns_wherever_the_head_reads_it(
    name: str, head: SegmentationHeadKind, unused: tuple[str, ...]
) -> None:
    card = BackboneCard(timm=name, image_size=32, channels=3)
    head_card = SegmentationHeadCard(head=head, width=16, classes=5)
    torch.manual_seed(0)
    model = build_segmenter(build_backbone(*card.build_args), card.to_dict(), head_card.to_dict(), "here")
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5, 32, 32)
    logits.square().mean().backward()
    frozen = {f"encoder.{name}" for name in unused}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    if head == "pyramid" and name != "test_vit":
        assert isinstance(model.head.get_submodule("pyramid"), LateralConvs)


def test_maps_are_enlarged_as_torch_does() -> None:
    maps = torch.randn(2, 3, 5, 7)
    for size in ((20, 21), (5, 9), (3, 4), (5, 7)):
        expected = F.interpolate(maps, size=size, mode="bilinear")
        torch.testing.assert_close(resize_maps(maps, size), expected, rtol=1e-5, atol=1e-6)


def test_windows_cover_an_image_and_end_with_it() -> None:
    assert window_top_lefts((16, 16), (16, 16), 0.5) == [(0, 0)]
    assert window_top_lefts((17, 16), (16, 16), 0.5) == [(0, 0), (1, 0)]
    assert window_top_lefts((24, 32), (16, 16), 0.5) == [(0, 0), (0, 8), (0, 16), (8, 0), (8, 8), (8, 16)]
    assert window_top_lefts((20, 16), (8, 16), 1.0) == [(0, 0), (8, 0), (12, 0)]


@pytest.mark.parametrize("batch", [1, 4])
def test_windows_are_averaged_as_probabilities(batch: int) -> None:
    """Compare with a loop over windows; the logits depend on a pixel's place in its window."""
    torch.manual_seed(0)
    weights = torch.randn(3, 8, 6)
    images = torch.randn(batch, 1, 13, 11)

    def predict_logits(windows: torch.Tensor) -> torch.Tensor:
        assert windows.shape[0] <= batch
        return windows * weights

    log_probs = list(iter_sliding_window_log_probs(predict_logits, images, (8, 6), 0.5))
    assert len(log_probs) == batch
    for image, image_log_probs in zip(images.numpy(), log_probs, strict=True):
        total, counts = np.zeros((3, 13, 11)), np.zeros((13, 11))
        for top in (0, 4, 5):
            for left in (0, 3, 5):
                odds = np.exp(image[:, top : top + 8, left : left + 6] * weights.numpy())
                total[:, top : top + 8, left : left + 6] += odds / odds.sum(axis=0)
                counts[top : top + 8, left : left + 6] += 1
        np.testing.assert_allclose(np.exp(image_log_probs.numpy()), total / counts, rtol=1e-5)


def test_one_window_is_the_image_itself() -> None:
    images = torch.randn(3, 5, 4, 6) * 200
    log_probs = torch.stack(list(iter_sliding_window_log_probs(lambda windows: windows, images, (4, 6), 0.5)))
    assert log_probs.equal(F.log_softmax(images, dim=1))
