"""What a run leaves in kept/ and export/: folders of timm's with a model card, whoever wrote the best weights."""

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.train import train
from foveal.atomic import read_json, write_json
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import ExportError
from foveal.models.backbone import backbone_card
from foveal.runs.inputs import inputs_from_dict, read_inputs
from foveal.training.exporting import _as_export_error
from foveal.training.run_directory import open_run
from foveal.weights.export import Card, read_card, write_export

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
CARD = Card("finetune", backbone_card("test_resnet", 32, 3), (0.5,) * 3, (0.25,) * 3)
FILES = ["README.md", "card.json", "config.json", "model.safetensors"]


def fine_tune(digits: Path, run_dir: Path, **run_settings: Any) -> Path:
    """Fine-tune for three steps that change nothing: the first evaluation is the best."""
    settings = {
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 8, "channels": 1, "lanes": 4, "samples_per_class": 30},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 100, "max_micro_size": 100},
        "optim": {"lr_per_256": 1e-30, "warmup_epochs": 0},
        "engine": {"kind": "plain"},
        "tracking": {"uri": None},
        "evaluate_every": 1,
        "early_stopping": {"metric": "val_loss", "patience": None},
        "card": {"license": "cc-by-4.0", "developers": "A | B"},
        "run": {"dir": str(run_dir)} | run_settings,
    }
    plan = plan_training(FinetuneConfig.from_dict(settings, "here"), 1)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        train(plan, run)
    return run_dir


def test_kept_and_published_weights_are_folders_of_timm(digits: Path, tmp_path: Path) -> None:
    run_dir = fine_tune(digits, tmp_path / "run", stop_at_step=2)
    (kept,) = (run_dir / "kept").iterdir()
    assert sorted(file.name for file in kept.iterdir()) == sorted([*FILES, "evaluation.json"])
    for name in ("README.md", "config.json"):
        (kept / name).unlink()  # a version that did not write them kept these weights
    fine_tune(digits, run_dir)
    export = run_dir / "export"
    assert sorted(file.name for file in export.iterdir()) == FILES
    model: Any = timm.create_model(f"local-dir:{export}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    text = (export / "README.md").read_text()
    for line in (
        "license: cc-by-4.0\n",
        "| Developed by | A \\| B |",
        "| training | digits | `train` | 1,437 (300 used) |",
        "| evaluation | digits | `val` | 360 |",
        "The step was chosen by `val_loss`",
    ):
        assert line in text
    assert str(tmp_path) not in text


def test_the_same_run_has_the_same_card(digits: Path, tmp_path: Path) -> None:
    texts = [(fine_tune(digits, tmp_path / name) / "export" / "README.md").read_bytes() for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_a_disk_that_fills_is_a_sentence(tmp_path: Path) -> None:
    """safetensors has an exception of its own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(ExportError, match=r"export cannot be written \(model\.safetensors: .*make room"),
            _as_export_error(tmp_path / "export"),
        ):
            write_export(tmp_path / "export", {"weight": torch.zeros(50_000)}, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_weights_that_an_older_version_kept_have_todays_inputs(digits: Path, tmp_path: Path) -> None:
    run_dir = fine_tune(digits, tmp_path / "run", stop_at_step=2)
    (kept,) = (run_dir / "kept").iterdir()
    card = read_json(kept / "card.json")
    recorded = card.pop("inputs")
    write_json(kept / "card.json", card)
    fine_tune(digits, run_dir)
    assert read_card(run_dir / "export").inputs == recorded == read_json(run_dir / "inputs.json")


def test_best_weights_of_a_forks_source_name_the_fork(digits: Path, tmp_path: Path) -> None:
    source = fine_tune(digits, tmp_path / "source", stop_at_step=1)
    fork = fine_tune(digits, tmp_path / "fork", fork=str(source), stop_at_step=2)
    recorded = read_inputs(source)
    shutil.rmtree(source)
    fine_tune(digits, fork)  # a fork that has begun does without its source
    card = read_card(fork / "export")
    inputs = inputs_from_dict(card.inputs, "card.json")
    assert (card.step, inputs) == (1, read_inputs(fork))  # the source's weights
    assert inputs is not None
    assert [(model.role, model.path, model.step) for model in inputs.models] == [("fork", str(source), 1)]
    assert inputs.models[0].inputs == recorded is not None
