"""The best evaluation of a run, by the metric that its settings select by, or the first that it logs."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from foveal.renames import translate_metrics
from foveal.runs.results import is_chosen, is_lower_better, is_result
from foveal.training.evaluations import Metric, find_best_step

_SELECTION_SETTING = "early_stopping.metric"
_ARM_SETTINGS = "trials.arms."
SPREAD_SUFFIXES = ("_lowest", "_highest", "_std")  # of a comparison's results; nothing without the metric
_MEAN, _FOLD, _FOLDS_SETTING = "_mean", "fold_", "cross_validation.count"
_USUAL_METRICS = ("mAP", "miou", "top1")  # by which models of a task are usually compared


@dataclass(frozen=True)
class BestResult:
    """The best value of a metric and the step of its evaluation; ``step`` is None where it is not known."""

    metric: str
    value: float
    step: int | None
    higher_is_better: bool


def find_best_result(
    evaluations: Mapping[int, Mapping[str, float]],
    settings: Mapping[str, Any],
    finished: Mapping[str, Any],
    training_names: Container[str] = (),
) -> BestResult | None:
    """Return the best of a run's evaluations by step and of the results in its finished.json; None without a result.

    ``training_names``: what steps log, which is no result. The last loss of a finished run without any other counts.
    """
    summary = translate_metrics(finished.get("summary", {}))
    results = {name: value for name, value in summary.items() if is_result(name, value)}
    results = {name: value for name, value in results.items() if name == "loss" or name not in training_names}
    if settings.get(_FOLDS_SETTING) is not None:
        return _find_mean_of_folds(results)
    if (best_arm := _find_best_arm(settings, results)) is not None:
        return best_arm
    metric = choose_metric(settings, [*evaluations.values(), results])
    if metric is None:
        return None
    known = {step: dict(results) for step, results in evaluations.items() if _is_number(results.get(metric.name))}
    if _is_number(summary.get(metric.name)):
        step = summary.get("best_step", summary.get("step"))
        if not isinstance(step, int | float):
            known = known or {-1: {metric.name: summary[metric.name]}}
        else:
            known[int(step)] = {metric.name: summary[metric.name]}
    best = find_best_step(known, metric)
    return BestResult(metric.name, known[best][metric.name], None if best < 0 else best, metric.higher_is_better)


def _find_mean_of_folds(results: Mapping[str, float]) -> BestResult | None:
    """Return the mean over the folds of a cross-validation; None before the last fold. A single fold says little."""
    means = {name.removesuffix(_MEAN): value for name, value in results.items() if name.endswith(_MEAN)}
    folds = {name: value for name, value in means.items() if name.startswith(_FOLD)}
    metric = choose_metric({}, [folds or means])
    if metric is None:
        return None
    return BestResult(f"{metric.name}{_MEAN}", means[metric.name], None, metric.higher_is_better)


def _find_best_arm(settings: Mapping[str, Any], results: Mapping[str, float]) -> BestResult | None:
    """Return the best arm of a comparison; None for another run. Metrics of the holdout chose the rate and are no result."""
    arms = [name.removeprefix(_ARM_SETTINGS) for name in settings if name.startswith(_ARM_SETTINGS)]
    candidates = {name: value for arm in arms for name, value in results.items() if name.startswith(f"{arm}_")}
    candidates = {name: value for name, value in candidates.items() if "_holdout_" not in name}
    metric = choose_metric({}, [candidates])
    arm = next((arm for arm in arms if metric is not None and metric.name.startswith(f"{arm}_")), None)
    if metric is None or arm is None:
        return None
    suffix, sign = metric.name.removeprefix(arm), 1 if metric.higher_is_better else -1
    values = {f"{arm}{suffix}": results[f"{arm}{suffix}"] for arm in arms if _is_number(results.get(f"{arm}{suffix}"))}
    best = max(values, key=lambda name: sign * values[name])
    return BestResult(best, values[best], None, metric.higher_is_better)


def choose_metric(settings: Mapping[str, Any], results: Iterable[Mapping[str, Any]]) -> Metric | None:
    """Return the metric by which runs like this are compared, among those that have a number in any of the results.

    It is that of early stopping if there is one, else the usual one of the task, else the first that is no loss, else a
    loss. None without a number.
    """
    names = list(
        dict.fromkeys(
            name
            for each in results
            for name, value in each.items()
            if _is_number(value)
            and name not in ("step", "best_step")
            and not name.endswith(SPREAD_SUFFIXES)
            and not is_chosen(name)
        )
    )
    selected = settings.get(_SELECTION_SETTING)
    if selected not in names:
        selected = min(names, key=_rank_metric, default=None)  # the first among equals
    return None if selected is None else Metric(selected, not is_lower_better(selected))


def _rank_metric(name: str) -> tuple[bool, bool, bool]:
    is_of_training = name.startswith("train_") or name == "loss"
    return is_of_training, is_lower_better(name), not name.endswith(_USUAL_METRICS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
