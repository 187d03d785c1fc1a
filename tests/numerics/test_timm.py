"""Our encoder is timm's: the same names, and the same features when nothing is masked."""

from typing import Any, Literal

import pytest
import timm
import torch

from foveal.config import height_and_width
from foveal.models.mae import DecoderConfig, MaskedAutoencoder
from foveal.models.vit import VitConfig, build_encoder

Positions = Literal["sincos", "learned"]
NAMES = ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_dinov2"]


def autoencoder(name: str, positions: Positions, size: int | tuple[int, int]) -> MaskedAutoencoder:
    torch.manual_seed(0)
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3, positions=positions)
    encoder = build_encoder(cfg, image_size=size, channels=3)
    return MaskedAutoencoder(encoder, DecoderConfig(width=16, depth=1, heads=2)).eval()


@pytest.mark.parametrize("size", [24, (16, 36)])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("name", NAMES)
def test_masking_nothing_is_timm(name: str, positions: Positions, size: int | tuple[int, int]) -> None:
    model = autoencoder(name, positions, size).double()
    images = torch.randn(2, 3, *height_and_width(size), dtype=torch.float64)
    expected = model.encoder.forward_features(images)
    torch.testing.assert_close(model.encode(images), expected, rtol=0, atol=1e-12)
    shuffled = torch.rand(2, 36).argsort(dim=1)
    found = model.encode(images, shuffled)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    for image in range(2):
        torch.testing.assert_close(found[image, 1:], expected[image, 1:][shuffled[image]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("pooling", ["token", "avg"])
@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_timms(name: str, pooling: Literal["token", "avg"], classes: int) -> None:
    sizes: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 4}
    theirs = timm.create_model(name, img_size=24, num_classes=classes, global_pool=pooling, **sizes)
    cfg = VitConfig(name=name, patch=4, width=48, depth=2, heads=3)
    ours = build_encoder(cfg, image_size=24, channels=3, drop_path=0.1, pooling=pooling, classes=classes)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=0)
