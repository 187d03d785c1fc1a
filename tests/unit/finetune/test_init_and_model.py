"""``init`` on the command line over a file that states a model, and a backbone in a model's place."""

from pathlib import Path

import pytest
import yaml

from finetune.config import FinetuneConfig
from finetune.multirun.cross_validation import fold_configs, plan_cross_validation
from finetune.plan import plan_training
from foveal.errors import ExportError
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

TEACHER = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2}
STUDENT = TEACHER | {"width": 8}


@pytest.fixture
def student(tmp_path: Path) -> str:
    encoder = build_encoder(VitConfig.model_validate(STUDENT), image_size=8, channels=1)
    card = Card("distill", encoder_card(VitConfig.model_validate(STUDENT), 8, 1), (0.3,), (0.4,))
    write_export(tmp_path / "student", encoder.state_dict(), card)
    return f"init={tmp_path / 'student'}"


@pytest.fixture
def file(digits: Path, tmp_path: Path) -> Path:
    """A config whose model is another one than the student."""
    tree = {
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 8, "channels": 1},
        "batch": {"global_size": 40},
        "engine": {"kind": "plain"},
        "model": TEACHER,
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "mine.yaml"


def test_a_students_export_replaces_the_model_of_the_file(file: Path, student: str) -> None:
    plan = plan_training(FinetuneConfig.load(file, [student]), 1)
    null = plan_training(FinetuneConfig.load(file, [student, "model=null"]), 1)
    assert plan.encoder == null.encoder
    assert plan.encoder["width"] == 8
    assert plan.science_settings() == null.science_settings()
    assert any("in place of the config's model" in line for line in plan.summary_lines())


def test_a_model_that_agrees_stays_science(file: Path, student: str) -> None:
    file.write_text(file.read_text().replace("width: 16", "width: 8"))
    assert plan_training(FinetuneConfig.load(file, [student]), 1).science_settings()["model.width"] == 8


def test_a_model_of_the_command_line_is_held_against_the_export(file: Path, student: str) -> None:
    for override, sentence in (
        ("model.width=16", "has width 8, the config says 16; they must be equal: leave model.width out, or set model="),
        ("backbone=test_resnet", "which backbone does not say; leave it out .backbone=null"),
        ("data.channels=3", "has channels 1, the config says 3; they must be equal: set data.channels=1"),
    ):
        with pytest.raises(ExportError, match=sentence):
            plan_training(FinetuneConfig.load(file, [student, override]), 1)
    file.write_text(file.read_text() + student.replace("=", ": "))
    with pytest.raises(ExportError, match="has width 8, the config says 16"):
        plan_training(FinetuneConfig.load(file), 1)


def test_folds_have_the_same_encoder_nested_or_in_an_array(file: Path, student: str) -> None:
    cfg = FinetuneConfig.load(file, [student, "cross_validation.count=2"])
    plan = plan_cross_validation(cfg, 1)
    assert (plan.cfg.model, plan.cfg.data.lanes) == (None, 20)
    alone, nested = (plan_training(fold_configs(outer)[0], 1).science_settings() for outer in (cfg, plan.cfg))
    assert alone == nested


def test_a_backbone_of_the_command_line_replaces_the_model_of_the_file(file: Path) -> None:
    cfg = FinetuneConfig.load(file, ["backbone=test_resnet"])
    assert (cfg.model, cfg.backbone) == (None, "test_resnet")
    both = FinetuneConfig.load(file, ["backbone=null", "seed=1"])
    assert both.model is not None
