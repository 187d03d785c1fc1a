"""Pictures of every kind of encoder, and the words that say what they show."""

import io
import math
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from encoders import KINDS, encoder_of
from PIL import Image
from torch import Tensor

from foveal.errors import ExportError
from foveal.inspect.encoder.pictures import MAX_IMAGES, draw_encoder_pictures
from foveal.inspect.picture import Picture
from foveal.models.backbone import build_backbone
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder

VIT = ["features", "attention", "attention-distance", "activations"]
CPU = torch.device("cpu")


def noise(count: int, size: int | tuple[int, int] = 16, channels: int = 3) -> Tensor:
    hw = (size, size) if isinstance(size, int) else size
    return torch.randint(0, 256, (count, channels, *hw), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(encoder: Any, images: Tensor, **options: Any) -> dict[str, Picture]:
    channels = images.shape[1]
    return dict(draw_encoder_pictures(encoder.eval(), images, (0.5,) * channels, (0.25,) * channels, CPU, **options))


def uniform_encoder(**sizes: Any) -> Any:
    """An encoder whose queries and keys are 0: its attention is uniform."""
    cfg = VitConfig(**{"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2} | sizes)
    encoder: Any = build_encoder(cfg, image_size=16, channels=3)
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight[: 2 * cfg.width] = 0  # type: ignore[operator]
            block.attn.qkv.bias.zero_()
    return encoder


@pytest.mark.parametrize(("name", "positions"), [KINDS[0], KINDS[4], *KINDS[-4::2], KINDS[-5]])
def test_every_kind_of_encoder_has_all_pictures(name: str, positions: Any) -> None:
    pictures = draw(encoder_of(name, positions, (16, 24)), noise(2, (16, 24)))
    assert list(pictures) == VIT
    for picture in pictures.values():
        assert picture.title
        assert "nan" not in picture.description
        assert re.search(r"\d", picture.description)
    assert "class token" in pictures["attention"].description


@pytest.mark.parametrize(
    ("name", "layers", "shown"),
    [("test_resnet", 5, 3), ("test_convnext", 4, 3), ("test_efficientnet", 5, 3), ("resnet18", 5, 3)],
)
def test_models_of_timm_have_what_makes_sense_and_say_what_they_lack(name: str, layers: int, shown: int) -> None:
    pictures = draw(build_backbone(name, 64, 3), noise(2, 64))
    assert list(pictures) == ["features", "activations"]
    words = pictures["activations"].description
    assert f"Charts over {layers} layers and 2 images" in words
    assert words.endswith("it has no attention between all patches to show.")
    assert pictures["features"].description.count("they hold") == shown


def test_an_encoder_without_a_class_token_shows_its_patches() -> None:
    words = draw(build_backbone("vit_base_patch16_siglip_gap_224", 32, 3), noise(1, 32))["attention"].description
    assert "Attention of all patches, averaged, to the patches in block 12, the last." in words
    assert "on the class token" not in words


def test_a_model_without_a_map_still_has_activations() -> None:
    pictures = draw(build_backbone("mixer_s32_224", 224, 3), noise(2, 224))
    assert list(pictures) == ["activations"]
    assert "makes no map of features" in pictures["activations"].description


def test_numbers_of_uniform_attention() -> None:
    pictures = draw(uniform_encoder(), noise(3))
    even, token = round(100 * 2 / 16), round(100 / 17)
    words = pictures["attention"].description
    assert f"gives {even} % of its attention to a tenth of the patches" in words
    assert f"even attention would give {even} %" in words
    assert f"{token} % of the attention, over all heads, is on the class token itself." in words
    words = pictures["attention-distance"].description
    assert "Mean attention distance is 8.0 px in block 1 and in block 2; uniform attention would reach 8.0 px." in words
    assert f"Mean entropy is {math.log(17):.2f} nats in block 1 and in block 2" in words


def test_the_layer_that_activates_most_is_named() -> None:
    encoder: Any = uniform_encoder(depth=3)
    with torch.no_grad():
        encoder.blocks[1].mlp.fc2.bias.fill_(50.0)
        encoder.blocks[2].mlp.fc2.bias.fill_(-50.0)
    words = draw(encoder, noise(2))["activations"].description
    assert words.startswith("The layer that activates most is block 2: the root mean square of its output is 5")
    assert re.search(r"From image to image block [13] changes most", words)
    assert "in block 2, which changes least" in words


@pytest.mark.parametrize(
    ("channels", "said"),
    [(1, ""), (2, "Of 2 channels, the images show the first."), (5, "Of 5 channels, the images show the first three.")],
)
def test_any_number_of_channels(channels: int, said: str) -> None:
    cfg = VitConfig(name="vit_tiny_patch16_224", patch=4, width=24, depth=1, heads=2)
    pictures = draw(build_encoder(cfg, image_size=16, channels=channels), noise(2, channels=channels))
    assert list(pictures) == VIT
    assert pictures["features"].description.endswith(said)


def test_all_images_have_a_row_up_to_eight() -> None:
    encoder = uniform_encoder(depth=1)
    heights = {}
    for count in (1, 8, 11):
        captions = [f"image\n{number}" for number in range(count)]
        picture = draw(encoder, noise(count), captions=captions)["features"]
        heights[count] = picture.image.height
        assert f"image {min(count, MAX_IMAGES) - 1}" in picture.description
        assert "image 8" not in picture.description
    assert heights[8] == heights[11] >= 8 * 128
    large = draw(build_backbone("test_resnet", 256, 3), noise(8, 256))["features"]
    assert 1500 <= large.image.height <= 1800  # reduced, so that all eight are there


def test_one_image_one_block_one_patch() -> None:
    cfg = VitConfig(name="vit_tiny_patch16_224", patch=16, width=24, depth=1, heads=1)
    pictures = draw(build_encoder(cfg, image_size=16, channels=3), noise(1))
    assert list(pictures) == VIT
    assert pictures["activations"].description.startswith("The root mean square of the output of block 1 is ")
    assert "From image to image" not in pictures["activations"].description
    assert "over 1 block and 1 image." in pictures["attention-distance"].description


def test_silent_layers() -> None:
    encoder = build_backbone("test_resnet", 64, 3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    pictures = draw(encoder, noise(2, 64))
    assert "root mean square of its output is 0" in pictures["activations"].description


def test_values_that_are_not_finite_are_a_sentence() -> None:
    encoder: Any = uniform_encoder()
    with torch.no_grad():
        encoder.blocks[1].mlp.fc2.bias[0] = math.nan
    with pytest.raises(ExportError, match="block 2 of the encoder gives values that are not finite"):
        draw(encoder, noise(1))


def test_charts_read_on_light_and_on_dark_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(mpl.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which has global state: an import of it would raise
    pictures = draw(uniform_encoder(), noise(2))
    for name in ("attention-distance", "activations"):
        pixels = np.asarray(pictures[name].image).astype(float)
        assert pixels.shape[2] == 4
        assert pixels[0, 0, 3] == 0
        assert pixels.shape[1] == 1600
        ink = pixels[pixels[..., 3] == 255][:, :3] / 255
        linear = np.where(ink <= 0.04045, ink / 12.92, ((ink + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]  # WCAG 2: contrast of at least 3 : 1 for graphics
        assert (1.05 / (luminance.max() + 0.05)) > 3
        assert ((luminance.min() + 0.05) / 0.05) > 3
    assert dict(mpl.rcParams) == before


def test_photographs() -> None:
    """A stem of the first stages sees edges: features of photographs lie in few dimensions, and differ by image."""
    place = os.environ.get("FOVEAL_TEST_DATA")
    if not place:
        pytest.skip("FOVEAL_TEST_DATA is not set: there are no photographs here")
    with tarfile.open(Path(place) / "imagenette224" / "val-000000.tar") as shard:
        members = [member for member in shard if member.name.endswith(".jpg")][:300:100]
        files = [shard.extractfile(member) for member in members]
        photos = [Image.open(io.BytesIO(file.read())).convert("RGB").resize((64, 64)) for file in files if file]
    images = torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in photos])
    torch.manual_seed(0)
    cfg = VitConfig(name="vit_tiny_patch16_224", patch=8, width=48, depth=3, heads=3)
    pictures = draw(build_encoder(cfg, image_size=64, channels=3), images)
    assert list(pictures) == VIT
    held = [int(share) for share in re.findall(r"they hold (\d+) %", pictures["features"].description)]
    assert min(held) > 50  # of noise they would hold some 15 %
    change = re.search(r"is (\d+) % of its root mean square", pictures["activations"].description)
    assert change and int(change[1]) > 50
