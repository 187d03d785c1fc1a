"""The best evaluation: by the metric of the settings, in its direction, wherever it is recorded."""

import math

import pytest

from foveal.runs.best_result import BestResult, find_best_result

EVALUATIONS = {
    10: {"val_loss": 0.9, "val_top1": 0.5, "val_top5": 0.8},
    20: {"val_loss": 0.7, "val_top1": 0.6, "val_top5": 0.8},
    30: {"val_loss": 0.8, "val_top1": 0.55, "val_top5": 0.9},
}


def test_the_usual_metric_and_its_best_step() -> None:
    assert find_best_result(EVALUATIONS, {}, {}) == BestResult("val_top1", 0.6, 20, True)


def test_the_metric_of_the_settings_comes_first_and_losses_fall() -> None:
    settings = {"early_stopping.metric": "val_loss"}
    assert find_best_result(EVALUATIONS, settings, {}) == BestResult("val_loss", 0.7, 20, False)
    missing = {"early_stopping.metric": "holdout_loss"}
    assert find_best_result(EVALUATIONS, missing, {}) == BestResult("val_top1", 0.6, 20, True)


@pytest.mark.parametrize(("name", "higher"), [("val_cls_distance", False), ("val_loss", False), ("val_f1", True)])
def test_directions(name: str, higher: bool) -> None:
    best = find_best_result({1: {name: 0.1}, 2: {name: 0.2}}, {}, {})
    assert best == BestResult(name, 0.2 if higher else 0.1, 2 if higher else 1, higher)


def test_not_a_number_is_never_best() -> None:
    assert find_best_result({1: {"val_loss": math.nan}, 2: {"val_loss": 3.0}}, {}, {}) == BestResult(
        "val_loss", 3.0, 2, False
    )
    assert find_best_result({1: {"val_loss": math.nan}}, {}, {}) is None
    assert find_best_result({}, {}, {}) is None


def test_a_finished_run_keeps_its_best_where_rows_are_too_many() -> None:
    summary = {"val_top1": 0.9, "best_step": 5, "step": 40, "loss": 0.1, "images_per_second": 7.0}
    assert find_best_result(EVALUATIONS, {}, {"summary": summary}) == BestResult("val_top1", 0.9, 5, True)


def test_what_steps_log_is_no_result_but_a_loss_is_better_than_nothing() -> None:
    summary = {"step": 40, "loss": 0.1, "train_top1": 0.9, "cls_distance": 0.2}
    assert find_best_result({}, {}, {"summary": summary}, {"loss", "train_top1", "cls_distance"}) == BestResult(
        "loss", 0.1, 40, False
    )


def test_of_a_comparison_the_best_arm() -> None:
    settings = {"trials.arms.scratch": None, "trials.arms.pre": "export"}
    summary = {
        "scratch_lr_per_256": 9.0,
        "scratch_top1": 0.4,
        "scratch_top1_highest": 0.99,
        "scratch_holdout_top1": 0.999,
    }
    summary |= {"pre_lr_per_256": 0.1, "pre_top1": 0.7, "pre_top1_highest": 0.8, "pre_holdout_top1": 0.1}
    assert find_best_result({}, settings, {"summary": summary}) == BestResult("pre_top1", 0.7, None, True)
