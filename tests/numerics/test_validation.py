"""Evaluations while an encoder trains: they change no number of the training, and are the same on any machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named
from safetensors.torch import load_file
from scenes import write_scenes

from foveal.errors import ConfigError
from foveal.tracking.jsonl import read_rows_without_time

PRETRAIN, DISTILL = stage_named("pretrain"), stage_named("distill")
SHORT = ("data.samples_per_class=20", "epochs=4")  # twelve steps
EVALUATED = ("evaluate_every=5",)
ZERO_3 = ("engine.zero=3", "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 40}}")


def training_rows(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("step", "loss", "grad_norm", "lr", "step_applied")
    return [{name: row[name] for name in names} for row in rows if "loss" in row]


def evaluations(rows: list[dict[str, float]]) -> dict[float, dict[str, float]]:
    return {row["step"]: row for row in rows if "val_loss" in row}


@pytest.fixture(scope="module")
def evaluated(
    configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """Pretraining in one process, evaluated every five steps."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    return run, one_rank.train(PRETRAIN, configs["pretrain"], run, *SHORT, *EVALUATED, "engine.kind=plain")


def test_the_training_is_the_same_without(
    evaluated: Any, configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    run, rows = evaluated
    assert list(evaluations(rows)) == [5, 10, 12]
    assert evaluations(rows)[12]["val_loss"] < evaluations(rows)[5]["val_loss"]
    assert 0.2 < evaluations(rows)[12]["val_knn_top1"] <= 1
    silent = one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "run", *SHORT, "engine.kind=plain")
    assert not evaluations(silent)
    assert training_rows(rows) == training_rows(silent)
    ours, theirs = (load_file(folder / "export" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


# Batches of 40 leave one rank without an image at the end, of data.val as of the bank.
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(ZERO_3, id="zero 3"),
        pytest.param(("engine.kind=accelerate", "engine.sharding=fsdp2"), id="fsdp2"),
        pytest.param(("engine.kind=accelerate",), marks=pytest.mark.thorough, id="ddp"),
    ],
)
def test_on_any_machine(
    engine: tuple[str, ...], evaluated: Any, configs: dict[str, Path], two_ranks: Ranks, tmp_path: Path
) -> None:
    settings = (*SHORT, *engine, "batch.max_micro_size=40")
    rows = two_ranks.train(PRETRAIN, configs["pretrain"], tmp_path / "run", *settings, *EVALUATED)
    for step, expected in evaluations(evaluated[1]).items():
        assert evaluations(rows)[step] == pytest.approx(expected, rel=1e-5)
    silent = two_ranks.train(PRETRAIN, configs["pretrain"], tmp_path / "silent", *settings)
    assert training_rows(rows) == training_rows(silent)


def test_a_resume_has_the_same_history(
    evaluated: Any, configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """Stopped where an evaluation is due and where none is."""
    run, settings = tmp_path / "run", (*SHORT, *EVALUATED, "engine.kind=plain")
    for stop in (5, 7):
        one_rank.train(PRETRAIN, configs["pretrain"], run, *settings, f"run.stop_at_step={stop}")
        assert list(evaluations(read_rows_without_time(run / "metrics.jsonl"))) == [5]
    (state_file,) = run.glob("checkpoints/step-00000007-*/state.json")
    assert list(json.loads(state_file.read_text())["scores"]) == ["5"]
    rows = one_rank.train(PRETRAIN, configs["pretrain"], run, *settings)
    assert [row for row in rows if "val_loss" in row] == [row for row in evaluated[1] if "val_loss" in row]
    last = evaluations(rows)[12]
    for file, key in (("finished.json", "summary"), ("export/card.json", "metrics")):
        told = json.loads((run / file).read_text())[key]
        assert told["val_loss"] == last["val_loss"]
        assert told["val_knn_top1"] == last["val_knn_top1"]


def test_students(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    """One of foveal and one with BatchNorm; and with a cache of the teacher's outputs, which has no image of data.val."""
    students = (
        "students=[{name: a, model: {patch: 4, width: 16, depth: 1, heads: 2}}, {name: b, backbone: test_resnet}]"
    )
    settings = (*SHORT, "model=null", students, "patch_weight=0", "optim.max_grad_norm=null", "engine.kind=plain")
    cached = (*settings, f"teacher_cache.dir={tmp_path}/cache")
    rows, again, silent = (
        one_rank.train(DISTILL, configs["distill"], tmp_path / name, *each)
        for name, each in (("run", (*settings, *EVALUATED)), ("cached", (*cached, *EVALUATED)), ("silent", cached))
    )
    assert training_rows(rows) == training_rows(again) == training_rows(silent)
    assert evaluations(rows) == evaluations(again)
    last = evaluations(rows)[12]
    assert last.keys() == {
        "step",
        "val_loss",
        *(f"val_{name}/{metric}" for name in "ab" for metric in ("loss", "cls_distance", "knn_top1")),
    }
    assert last["val_loss"] == pytest.approx(last["val_a/loss"] + last["val_b/loss"])
    assert all(0.2 < last[f"val_{name}/knn_top1"] <= 1 for name in "ab")


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(ZERO_3, id="zero 3"),
        pytest.param(("engine.kind=accelerate", "engine.sharding=fsdp2"), id="fsdp2"),
    ],
)
@pytest.mark.thorough
def test_students_on_any_machine(
    engine: tuple[str, ...], configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    settings = ("data.samples_per_class=20", "epochs=2", "evaluate_every=4", "batch.max_micro_size=40")
    one = one_rank.train(DISTILL, configs["distill"], tmp_path / "one", *settings, "engine.kind=plain")
    two = two_ranks.train(DISTILL, configs["distill"], tmp_path / "two", *settings, *engine)
    for step, expected in evaluations(one).items():
        assert evaluations(two)[step] == pytest.approx(expected, rel=1e-5)


def test_images_without_classes_have_no_neighbours(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    data = [f"data.path={write_scenes(tmp_path / 'data', classes=None)}", "data.mean=[0.5]", "data.std=[0.2]"]
    settings = (*data, "data.lanes=4", "batch.global_size=8", "engine.kind=plain", "evaluate_every=1")
    rows = one_rank.train(PRETRAIN, configs["pretrain"], tmp_path / "run", *settings)
    assert [row.keys() for row in rows if "val_loss" in row] == [{"step", "val_loss"}] * 2


def test_nothing_to_evaluate_on_is_a_sentence(configs: dict[str, Path]) -> None:
    for stage in (PRETRAIN, DISTILL):
        cfg = stage.config_class.load(configs[stage.name], ["run.dir=runs/x", "data.val=test", "evaluate_every=5"])
        with pytest.raises(
            ConfigError, match=r"evaluate_every=5 needs images to evaluate on: .* 'test' does not exist"
        ):
            stage.functions.build_plan(cfg, 1)
        plan = stage.functions.build_plan(cfg.model_copy(update={"evaluate_every": 0}), 1)
        assert not [line for line in plan.summary_lines() if line.startswith("evaluate")]
