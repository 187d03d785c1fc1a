"""What the newest rows say: pace with evaluations and saves, the loss's trend, and nothing where they say nothing."""

import math

import pytest
from run_directories import steps

from foveal.runs.recent_rows import RecentRows, summarize_rows


def test_no_rows_say_nothing() -> None:
    assert summarize_rows([]) == RecentRows()
    only_evaluated = summarize_rows([{"step": 3, "val_loss": 0.5, "time": 7.0}])
    assert (only_evaluated.step, only_evaluated.written_at, only_evaluated.evaluations) == (
        None,
        7.0,
        {3: {"val_loss": 0.5}},
    )


def test_the_newest_row_and_its_rates() -> None:
    rows = summarize_rows(reversed(steps(1, 95, begin=1000.0, seconds=2.0)))
    assert (rows.step, rows.written_at, rows.lr) == (95, 1190.0, 1e-3)
    assert (rows.images_per_second, rows.data_wait) == (195.0, 0.25)
    assert rows.loss == pytest.approx(1 / 95)
    assert rows.seconds_per_step == pytest.approx(2.0)
    assert rows.longest_gap_seconds == pytest.approx(20.0)


def test_the_pace_contains_what_lies_between_rows() -> None:
    rows = steps(1, 20, begin=0.0) + steps(21, 40, begin=80.0)  # an evaluation of a minute
    assert summarize_rows(reversed(rows)).seconds_per_step == pytest.approx((100 - 10) / 30)


def test_the_pace_is_of_this_attempt_and_of_ten_minutes() -> None:
    rows = steps(1, 100, begin=0.0, seconds=100.0) + steps(101, 1100, begin=20_000.0)
    assert summarize_rows(reversed(rows)).seconds_per_step == pytest.approx(1.0)
    assert summarize_rows(reversed(rows), 20_995.0).seconds_per_step is None  # one write since: no pace yet
    slow = steps(1, 30, begin=0.0, seconds=100.0)  # a write in a thousand seconds
    assert summarize_rows(reversed(slow)).seconds_per_step == pytest.approx(100.0)


def test_the_trend_compares_equal_parts_and_passes_over_what_is_not_finite() -> None:
    rows = [{"step": step, "loss": 2.0 if step <= 10 else 1.0, "time": 1.0} for step in range(1, 21)]
    trend = summarize_rows(reversed(rows)).trend
    assert trend is not None
    assert (trend.mean_before, trend.mean, trend.num_steps) == (2.0, 1.0, 10)
    rows[-1]["loss"] = math.nan
    trend = summarize_rows(reversed(rows)).trend
    assert trend is not None
    assert trend.mean == 1.0
    assert summarize_rows(reversed([row | {"loss": math.nan} for row in rows])).trend is None
    assert summarize_rows(reversed(rows[:9])).trend is None


def test_several_rows_of_a_step_are_one_evaluation() -> None:
    rows = [{"step": 5, "val_top1": 0.5, "time": 1.0}, {"step": 5, "val_knn_top1": 0.4, "time": 2.0}]
    assert summarize_rows(reversed(rows)).evaluations == {5: {"val_top1": 0.5, "val_knn_top1": 0.4}}


def test_rows_of_another_kind_do_no_harm() -> None:
    rows = summarize_rows([{"step": 2, "loss": None}, {"step": 1, "loss": "high", "time": "noon", "lr": True}])
    assert (rows.step, rows.loss, rows.lr, rows.written_at, rows.seconds_per_step) == (2, None, None, None, None)
