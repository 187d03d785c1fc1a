"""``foveal config``: what ships is listed and printed; ``upgrade``: the same settings under the new names, in place."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal.cli import app
from foveal.commands.config import upgrade_text
from foveal.errors import ConfigError
from foveal.training.config_files import SHIPPED_CONFIGS

STAGE = """\
# A comment with batch.images in it stays.
epochs: 2  # two
lesson: layers
data:
  path: data/digits  # where
  crop_ratio: 1.0
  augment: {scale: [0.2, 1.0], flip: 0.5, operations: 2, magnitude: 9.0, magnitude_std: 0.5}
  mix:
    - {path: more, share: 0.25}
batch: {images: 8, "at_once": 4}
lesson_cache:
  gigabytes: 3.0
  dir: cache
early_stopping: {metric: val_map, patience: 2}
"""
UPGRADED = """\
# A comment with batch.images in it stays.
epochs: 2  # two
method: layers
data:
  path: data/digits  # where
  eval_crop_ratio: 1.0
  augment: {scale: [0.2, 1.0], hflip: 0.5, rand_augment: {ops: 2, magnitude: 9.0, magnitude_std: 0.5}}
  mix:
    - {path: more, fraction: 0.25}
batch: {global_size: 8, max_micro_size: 4}
teacher_cache:
  max_gigabytes: 3.0
  dir: cache
early_stopping: {metric: val_mAP, patience: 2}
"""
BLOCK = "data:\n  path: x\n  augment:\n    operations: 2  # two\n    flip: 0.5\n    magnitude: 7.0\n"
PIPELINE = """\
- name: a
  stage: finetune
  config: configs/finetune/digits.yaml
  set: {batch.images: 8, data.augment.operations: 1, folds: {count: 2}}
"""


def upgrade(file: Path, text: str) -> tuple[str, str]:
    file.write_text(text)
    result = CliRunner().invoke(app, ["config", "upgrade", str(file)], catch_exceptions=False)
    assert result.exit_code == 0
    return file.read_text(), result.output


def test_a_stage_keeps_its_comments_and_its_order(tmp_path: Path) -> None:
    text, said = upgrade(tmp_path / "stage.yaml", STAGE)
    assert (text, "rewritten" in said) == (UPGRADED, True)
    text, said = upgrade(tmp_path / "stage.yaml", UPGRADED)
    assert (text, "no name of 0.1" in said) == (UPGRADED, True)


def test_settings_that_moved_into_a_section() -> None:
    expected = "data:\n  path: x\n  augment:\n    rand_augment: {ops: 2, magnitude: 7.0}  # two\n    hflip: 0.5\n"
    assert upgrade_text(BLOCK) == expected


def test_a_pipeline(tmp_path: Path) -> None:
    text, _ = upgrade(tmp_path / "pipeline.yaml", PIPELINE)
    wanted = "set: {batch.global_size: 8, data.augment.rand_augment.ops: 1, cross_validation: {count: 2}}"
    assert wanted in text
    assert text.count("\n") == PIPELINE.count("\n")


def test_labels_become_a_task(tmp_path: Path) -> None:
    text, _ = upgrade(tmp_path / "a.yaml", "epochs: 1\ndata:\n  path: x\n  labels: mask  # kind\n  lanes: 4\n")
    assert text == "epochs: 1\ntask: segmentation\ndata:\n  path: x\n  # kind\n  lanes: 4\n"
    text, _ = upgrade(tmp_path / "b.yaml", "data: {path: x, labels: class, lanes: 4}\n")
    assert text == "data: {path: x, lanes: 4}\n"
    text, _ = upgrade(tmp_path / "c.yaml", PIPELINE.replace("batch.images: 8", "data.labels: boxes"))
    assert "set: {task: detection, data.augment" in text


def test_a_file_keeps_its_mode_its_line_ends_and_the_link_to_it(tmp_path: Path) -> None:
    file, link = tmp_path / "a.yaml", tmp_path / "link.yaml"
    file.write_bytes(b"epochs: 2\r\nbatch:\r\n  images: 8\r\n")
    file.chmod(0o600)
    link.symlink_to(file)
    CliRunner().invoke(app, ["config", "upgrade", str(link)], catch_exceptions=False)
    assert file.read_bytes() == b"epochs: 2\r\nbatch:\r\n  global_size: 8\r\n"
    assert (file.stat().st_mode & 0o777, link.is_symlink()) == (0o600, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "link.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "base: &a {operations: 2}\ndata: {path: x, augment: {<<: *a, flip: 0.5}}\n",
        "target: |-\n  latents\nepochs: 1\n",
        "target: &t latents\ninit: *t\n",
        "{epochs: 2, data: {labels: mask, path: x}}\n",
        "data: {\n  path: x,  # the path\n  labels: mask,\n  image_size: 8\n}\n",
        "- name: a\n  set: {data: {labels: mask, path: x}}\n",
        "data:\n  labels: mask\n",
        "batch: {images: 8, global_size: 8}\n",
        "data: {augment: {magnitude: 7.0, rand_augment: {ops: 2}}}\n",
    ],
)
def test_what_cannot_be_rewritten_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    result = CliRunner().invoke(app, ["config", "upgrade", str(tmp_path / "file.yaml")])
    assert isinstance(result.exception, ConfigError)
    assert "change it by hand" in str(result.exception) or "are one setting" in str(result.exception)
    assert (tmp_path / "file.yaml").read_text() == text
    assert len(list(tmp_path.iterdir())) == 1


def test_what_ships_is_listed_and_printed_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["config", "list", "pretrain"]).output
    assert "  pretrain/digits  " in listed
    assert "finetune/digits" not in listed
    text = (SHIPPED_CONFIGS / "pretrain" / "digits.yaml").read_text()
    for name in ("pretrain/digits", "configs/pretrain/digits.yaml"):
        assert CliRunner().invoke(app, ["config", "show", name]).output == text
    assert CliRunner().invoke(app, ["config", "show", "cpu2"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["list", "pipeline"],
            r"there are no configs of 'pipeline'; there are pretrain, distill, finetune, accelerate",
        ),
        (
            ["show", "digits"],
            r"several configs are named 'digits': give pretrain/digits or distill/digits or finetune/",
        ),
        (["show", "imagenete"], r"no config 'imagenete' ships with foveal. Did you mean '(pretrain/)?imagenet"),
    ],
)
def test_a_config_that_does_not_ship_is_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        CliRunner().invoke(app, ["config", *words], catch_exceptions=False)
