"""The names of metrics, runs and models in MLflow."""

from pathlib import Path

import pytest
from mlflow.utils.validation import _validate_metric_name

from foveal.tracking.mlflow_names import name_metric, name_metrics, name_model, name_run, name_stage_result
from foveal.tracking.params import MAX_PARAMS, choose_params


def test_groups() -> None:
    step = {"step": 3, "time": 1.0, "loss": 0.5, "lr": 0.1, "grad_norm": 1.0, "train_top1": 0.25, "small/loss": 0.5}
    system = {"images_per_second": 9.0, "data_wait": 0.1, "save_stall_ms": 3.0, "step_applied": 1.0, "bad_samples": 0.0}
    assert name_metrics(step | system) == {
        "train/loss": 0.5,
        "update/lr": 0.1,
        "update/grad_norm": 1.0,
        "train/top1": 0.25,
        "train/small/loss": 0.5,
        "system/images_per_second": 9.0,
        "system/data_wait": 0.1,
        "system/save_stall_ms": 3.0,
    }
    results = {
        "step": 3,
        "val_top1": 0.5,
        "holdout_top1": 0.25,
        "fold_mAP": 0.125,
        "val_small/top1": 0.75,
        "arm_top1": 1,
    }
    assert name_metrics(results) == {
        "val/top1": 0.5,
        "val/holdout/top1": 0.25,
        "val/fold/mAP": 0.125,
        "val/small/top1": 0.75,
        "arm_top1": 1.0,
    }


def test_what_happens_now_and_then_is_sent_when_it_happens() -> None:
    assert name_metrics({"step": 3, "loss": 0.0, "step_applied": 0.0, "bad_samples": 2.0}) == {
        "train/loss": 0.0,
        "system/step_refused": 1.0,
        "system/bad_samples": 2.0,
    }


@pytest.mark.parametrize(
    "name", ["an arm+its_top1", "../x", "a//b", "/a", "a/", ".", "…", "x" * 400, "val_", "train_", "\n"]
)
def test_names_of_users_are_names_of_mlflow(name: str) -> None:
    for of_step in (True, False):
        found = name_metric(name, of_step=of_step)
        _validate_metric_name(found)
        assert len(found) <= 250


def test_names_tell_pipelines_apart(tmp_path: Path) -> None:
    demo = tmp_path / "runs" / "demo"
    assert name_run(demo / "distill", demo) == "demo/distill"
    assert name_run(demo / "students" / "small", demo) == "demo/students/small"
    assert name_run(tmp_path / "elsewhere", demo) == "demo/elsewhere"
    assert name_run(tmp_path / "cifar" / "teacher", None) == "cifar/teacher"
    assert name_run(tmp_path / "runs" / "digits", None) == "digits"
    assert name_model("demo/distill", "export/a.b") == "demo-distill-a_b"
    assert name_stage_result("distill", "val_small/top1") == "distill.val.small.top1"


def test_params_are_few_and_sorted() -> None:
    settings = {f"data.{number}": number for number in range(300)} | {
        "seed": 0,
        "epochs": 3,
        "init": None,
        "log.every": 1,
    }
    assert choose_params(settings, ["data.7", "epochs", "inherited.x", "gone"]) == ["epochs", "seed", "data.7"]
    assert len(choose_params(settings, list(settings))) == MAX_PARAMS
