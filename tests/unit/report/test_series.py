"""A curve of any length has few points, and among them its extremes."""

import math
import random

import pytest

from foveal.report.curves import collect_curves
from foveal.report.series import MAX_BUCKETS, Series


def series_of(values: list[float], first_step: int = 1) -> Series:
    series = Series()
    for step, value in enumerate(values, first_step):
        series.add(step, value)
    return series


def test_a_short_curve_has_every_value() -> None:
    series = series_of([3.0, 2.0, 2.5])
    assert series.points() == [(1, 3.0), (2, 2.0), (3, 2.5)]
    assert not series.is_thinned


@pytest.mark.parametrize("length", [MAX_BUCKETS, MAX_BUCKETS + 1, 2 * MAX_BUCKETS + 1, 50_003])
def test_a_long_curve_is_bounded_and_keeps_its_extremes(length: int) -> None:
    random.seed(length)
    values = [random.gauss(0, 1) for _ in range(length)]
    values[length // 3], values[length // 2] = 99.0, -99.0
    series = series_of(values)
    points = series.points()
    assert len(points) <= 2 * MAX_BUCKETS
    assert len(series._buckets) <= 2 * MAX_BUCKETS
    assert points == sorted(points)
    assert {(length // 3 + 1, 99.0), (length // 2 + 1, -99.0)} <= set(points)
    assert (series.highest, series.lowest) == ((length // 3 + 1, 99.0), (length // 2 + 1, -99.0))
    assert (series.first, series.last) == ((1, values[0]), (length, values[-1]))


def test_means_are_those_of_the_buckets() -> None:
    length = 4 * MAX_BUCKETS
    series = series_of([float(number % 2) for number in range(length)])
    means = [value for _, value in series.means()]
    assert set(means) == {0.5}
    assert len(means) <= MAX_BUCKETS


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    series = series_of([1.0, math.nan, 3.0, math.inf])
    assert series.points() == [(1, 1.0), (2, None), (3, 3.0), (4, None)]
    assert (series.num_nonfinite, series.first_nonfinite_step, series.last) == (2, 2, (3, 3.0))


def test_a_curve_without_a_finite_value_has_only_gaps() -> None:
    series = series_of([math.nan] * (3 * MAX_BUCKETS))
    assert series.last is None
    assert {value for _, value in series.points()} == {None}
    assert series.table(12) == []


def test_a_repeated_step_replaces_what_follows_it() -> None:
    series = series_of([5.0, 4.0, 3.0, 2.0])
    series.add(3, 3.5)
    assert series.points() == [(1, 5.0), (2, 4.0), (3, 3.5)]


def test_what_a_repeated_step_replaces_is_in_no_number() -> None:
    series = series_of([5.0, 4.0, 9.0, math.nan, 0.1])
    series.add(3, 4.5)
    assert (series.num_values, series.num_nonfinite, series.first_nonfinite_step) == (3, 0, None)
    assert (series.first, series.last, series.lowest, series.highest) == ((1, 5.0), (3, 4.5), (2, 4.0), (1, 5.0))
    series.add(2, math.nan)
    assert (series.last, series.num_values, series.num_nonfinite) == ((1, 5.0), 2, 1)
    series.add(1, 7.0)
    assert (series.first, series.last, series.lowest, series.highest) == ((1, 7.0),) * 4


def test_a_table_has_the_first_and_the_last_value() -> None:
    series = series_of([float(number) for number in range(10_000)])
    table = series.table(12)
    assert len(table) == 12
    assert (table[0], table[-1]) == ((1, 0.0), (10_000, 9999.0))


def test_steps_become_images() -> None:
    series = series_of([3.0, 2.0]).scale_steps(64)
    assert series.points() == [(64, 3.0), (128, 2.0)]
    assert series.lowest == (128, 2.0)


def test_rows_become_curves_of_steps_and_of_evaluations() -> None:
    rows = [
        {"step": 1, "loss": 2.0, "lr": 0.1, "time": 5.0},
        {"step": 1, "val_top1": 0.5, "time": 6.0, "comment": "text"},
        {"to": 1, "time": 6.5},
        {"step": 2, "loss": math.nan, "time": 7.0},
    ]
    curves = collect_curves(rows)
    assert curves.steps.keys() == {"loss", "lr"}
    assert curves.evaluations.keys() == {"val_top1"}
    assert (curves.last_step, curves.first_time, curves.last_time) == (2, 5.0, 7.0)


def test_metrics_of_many_classes_are_bounded() -> None:
    curves = collect_curves({"step": 1, **{f"ap_{number}": 0.5 for number in range(5000)}} for _ in range(1))
    assert len(curves.evaluations) == 300
