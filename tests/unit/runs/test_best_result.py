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


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("val_cls_distance", False),
        ("val_loss", False),
        ("val_f1", True),
        ("val_mse", False),
        ("a_error_mean", False),
        ("val_loss_ratio", True),
    ],
)
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


def test_of_a_cross_validation_the_mean_of_its_folds() -> None:
    settings = {"cross_validation.count": 3, "early_stopping.metric": "val_top1"}
    folds = {number: {"fold_loss": 1.0, "fold_top1": value} for number, value in enumerate((0.5, 0.9, 0.7), start=1)}
    summary = {"folds": 3.0, "holdout_top1_mean": 0.95, "holdout_top1_std": 0.1}
    summary |= {"fold_loss_mean": 1.0, "fold_top1_mean": 0.7, "fold_top1_std": 0.2, "fold_top1_highest": 0.9}
    assert find_best_result(folds, settings, {"summary": summary}) == BestResult("fold_top1_mean", 0.7, None, True)
    assert find_best_result(folds, settings, {}) is None  # the luckiest fold is no result
