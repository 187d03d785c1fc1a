"""The best evaluation, early stopping, and evaluations stored in a checkpoint."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from stores import state

from foveal.atomic import write_json
from foveal.checkpoint.state import read_train_state
from foveal.training.evaluations import (
    Evaluations,
    Metric,
    collect_metric_values,
    filter_up_to_step,
    find_best_step,
    is_patience_exhausted,
)

TOP1, LOSS = Metric("val_top1", higher_is_better=True), Metric("val_loss", higher_is_better=False)
ERROR = Metric("val_error", higher_is_better=False)


def scores(*numbers: float, metric: str = "val_top1") -> Evaluations:
    """Evaluations every 10 steps."""
    return {10 * index: {metric: number} for index, number in enumerate(numbers, start=1)}


def test_the_metric_says_which_evaluation_is_better_and_not_its_name() -> None:
    assert find_best_step(scores(0.1, 0.3, 0.2), TOP1) == 20
    assert find_best_step(scores(0.1, 0.3, 0.05, metric="val_loss"), LOSS) == 30
    assert find_best_step(scores(0.1, 0.3, 0.05, metric="val_error"), ERROR) == 30


def test_the_first_of_equals_is_the_best_and_no_number_the_worst() -> None:
    assert find_best_step(scores(0.1, 0.3, 0.3), TOP1) == 20
    assert find_best_step(scores(math.nan, 0.1), TOP1) == 20
    assert find_best_step(scores(math.nan, 9.0, math.nan, metric="val_loss"), LOSS) == 20
    assert find_best_step(scores(math.nan, math.nan), TOP1) == 10


def test_it_is_over_when_the_best_is_so_many_evaluations_old() -> None:
    exhausted = [is_patience_exhausted(scores(*(0.5, 0.4, 0.6, 0.6, 0.1)[:count]), TOP1, 2) for count in range(6)]
    assert exhausted == [False, False, False, False, False, True]
    assert is_patience_exhausted(scores(0.5, 0.4), TOP1, 1)
    assert is_patience_exhausted(scores(math.nan, math.nan), TOP1, 1)
    source, last = scores(0.5, 0.4, 0.3), max(scores(0.5, 0.4, 0.3))
    assert is_patience_exhausted(source, TOP1, 2)
    assert not is_patience_exhausted(source, TOP1, 2, last), "a fork counts its own evaluations"
    assert not is_patience_exhausted(source | {last + 1: {TOP1.name: 0.2}}, TOP1, 2, last)
    assert is_patience_exhausted(source | {last + n: {TOP1.name: 0.2} for n in (1, 2)}, TOP1, 2, last)


def test_the_order_is_that_of_the_steps_and_later_ones_can_be_left_out() -> None:
    evaluations = {30: {"a": 3.0}, 10: {"a": 1.0}, 20: {"a": 2.0}}
    assert collect_metric_values(evaluations, "a") == [1.0, 2.0, 3.0]
    assert collect_metric_values(filter_up_to_step(evaluations, 20), "a") == [1.0, 2.0]


def test_a_checkpoint_keeps_steps_as_numbers_and_an_older_one_has_none(tmp_path: Path) -> None:
    tree = asdict(state(7)) | {"scores": {9: {"val_top1": 0.5}, 10: {"val_top1": math.nan}}}
    write_json(tmp_path / "state.json", tree)
    stored = read_train_state(tmp_path).scores
    assert list(stored) == [9, 10]
    assert stored[9] == {"val_top1": 0.5}
    assert math.isnan(stored[10]["val_top1"])
    del tree["scores"]
    (tmp_path / "state.json").write_text(json.dumps(tree))
    assert read_train_state(tmp_path) == state(7)
