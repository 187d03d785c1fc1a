"""The grid of foreign positions: a table of as many patches as the data's images may be of another grid."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from foveal.data.config import DataConfig
from foveal.errors import ExportError
from foveal.models.sincos import sincos_positions
from foveal.weights.position_grid import infer_patch_grid
from foveal.weights.pretrained import inspect_pretrained
from foveal.weights.teacher import build_unfrozen_teacher

VIT = "vit_tiny_patch16_224"
HERE = Path("weights.safetensors")


def data(**settings: Any) -> DataConfig:
    return DataConfig.from_dict({"path": "x", "image_size": (32, 128)} | settings, "here")


def table(rows: int) -> Tensor:
    return torch.randn(1, rows, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("positions", "num_prefix", "stated", "expected"),
    [
        (table(17), 1, [(16, 16)], (4, 4)),
        (table(17), 1, [(8, 32)], (2, 8)),
        (table(17), 1, [(224, 224), (32, 8)], (8, 2)),
        (table(16), 0, [(16, 16)], (4, 4)),
        (table(21), 5, [(16, 16)], (4, 4)),
        (sincos_positions(2, 8, 8)[None], 0, [], (2, 8)),
        (sincos_positions(4, 4, 8)[None], 0, [], (4, 4)),
        (table(25), 0, [], (5, 5)),
    ],
)
def test_the_grid_of_a_table(
    positions: Tensor, num_prefix: int, stated: list[tuple[int, int]], expected: tuple[int, int]
) -> None:
    assert infer_patch_grid(positions, num_prefix, 4, (2, 8), stated, HERE) == expected


@pytest.mark.parametrize("stated", [[], [(224, 224)], [(7, 28), (10, 33)]])  # the last: no whole number of patches
def test_a_table_of_a_square_and_of_the_datas_grid_is_asked_for(stated: list[tuple[int, int]]) -> None:
    """The weights may have been trained at the data's shape already; a square grid of the data is no question."""
    with pytest.raises(ExportError) as caught:
        infer_patch_grid(table(17), 1, 4, (2, 8), stated, HERE)
    assert str(caught.value) == (
        f"{HERE} has positions that fit images of 16 x 16 and of 8 x 32 pixels (data.image_size), and nothing says which "
        f'they are of; state "image_size": [16, 16] or [8, 32] in a config.json beside them'
    )
    for data_grid in ((4, 4), (3, 5)):
        assert infer_patch_grid(table(17), 1, 4, data_grid, stated, HERE) == (4, 4)


def test_a_table_that_is_no_square_is_the_datas_grid_or_one_sentence() -> None:
    assert infer_patch_grid(table(19), 1, 4, (3, 6), [], HERE) == (3, 6)
    with pytest.raises(ExportError) as caught:
        infer_patch_grid(table(19), 1, 4, (2, 8), [(28, 28)], HERE)
    assert str(caught.value) == (
        f"{HERE} has positions of 18 patches, which are neither 2 x 8 nor a square; state image_size: [height, width] "
        f"in a config.json beside them"
    )


def write_model(folder: Path, name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(name, num_classes=0, **options)
    nn.init.normal_(model.pos_embed)
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def teacher_positions(folder: Path, name: str, cfg: DataConfig) -> Tensor:
    source = inspect_pretrained(folder, name, cfg)
    teacher: Any = build_unfrozen_teacher(source.load_weights(), source.card, cfg.image_size, folder)
    return teacher.pos_embed


@pytest.mark.parametrize("name", [VIT, "vit_small_patch14_reg4_dinov2"])
def test_positions_of_as_many_patches_are_resampled_as_timm_does(name: str, tmp_path: Path) -> None:
    """4 x 4 patches to 2 x 8, with a row for the class token and without one for it and the registers."""
    patch = 14 if "14" in name else 16
    model = write_model(tmp_path, name, img_size=4 * patch)
    cfg = data(image_size=(2 * patch, 8 * patch))
    with pytest.raises(ExportError, match="and nothing says which they are of"):
        inspect_pretrained(tmp_path, name, cfg)
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 4 * patch}))
    expected = resample_abs_pos_embed(model.pos_embed, [2, 8], [4, 4], model.pos_embed.shape[1] - 16)
    assert teacher_positions(tmp_path, name, cfg).equal(expected)
    assert inspect_pretrained(tmp_path, name, cfg).card.encoder["image_size"] == 4 * patch, "the plan says: resized"


def test_a_stated_size_and_runs_of_before_0_2_take_the_rows_as_they_are(tmp_path: Path) -> None:
    model = write_model(tmp_path, VIT, img_size=(32, 128))
    assert teacher_positions(tmp_path, VIT, data(weights_version=1)).equal(model.pos_embed)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 32, 128]}}))
    assert teacher_positions(tmp_path, VIT, data()).equal(model.pos_embed)
    before = inspect_pretrained(tmp_path, VIT, data(image_size=32, weights_version=1)).card
    assert before.encoder["image_size"] == 64, "before 0.2 config.json was not asked"


def test_positions_of_no_grid_are_one_sentence(tmp_path: Path) -> None:
    write_model(tmp_path, VIT, img_size=(48, 96))
    with pytest.raises(ExportError, match=r"positions of 18 patches, which are neither 2 x 8 nor a square"):
        inspect_pretrained(tmp_path, VIT, data())
    assert inspect_pretrained(tmp_path, VIT, data(image_size=(48, 96))).card.encoder["image_size"] == [48, 96]


def test_a_timm_model_with_weights_of_its_grid_is_not_used_on_another(tmp_path: Path) -> None:
    """foveal does not resize the positions of models that it takes from timm as they are."""
    name = "deit_tiny_distilled_patch16_224"
    write_model(tmp_path, name, img_size=64)
    with pytest.raises(ExportError, match="positions that fit images of 64 x 64 and of 32 x 128 pixels"):
        inspect_pretrained(tmp_path, name, data())
    assert inspect_pretrained(tmp_path, name, data(weights_version=1)).card.encoder["image_size"] == [32, 128]
    (tmp_path / "config.json").write_text(json.dumps({"image_size": 64}))
    with pytest.raises(
        ExportError, match=r"of images of 64 x 64 pixels and has weights of that size alone \(pos_embed"
    ):
        inspect_pretrained(tmp_path, name, data())
    assert inspect_pretrained(tmp_path, name, data(image_size=64)).card.encoder["image_size"] == 64
    (tmp_path / "config.json").write_text(json.dumps({"image_size": [32, 128]}))
    assert inspect_pretrained(tmp_path, name, data()).card.encoder["image_size"] == [32, 128]
