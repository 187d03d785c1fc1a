"""Run of probes: extract the frozen encoder's features once, then fit every probe kind on every layer.

A unit (a kind on a layer) is fitted by one rank without communication, so that results do not depend on the number of
ranks. Ranks synchronise between slices of their units, which keeps collectives short and lets all ranks stop together
on preemption. Each unit's result is saved; a resumed attempt reuses the cached features and saved results.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.list_edges import describe_list_edge
from finetune.probe.config import HYPERPARAMETERS, ProbeKind
from finetune.probe.features import (
    FeatureExtractor,
    LayerFeatures,
    build_feature_extractor,
    check_cached_features,
    extract_and_cache_features,
    load_layer_features,
)
from finetune.probe.heads import Predictor, Resumable, fit_attentive_probe, fit_linear_probe
from finetune.probe.knn import fit_knn_probe
from finetune.probe.logistic import fit_logistic_probe
from finetune.probe.plan import ProbePlan
from finetune.result_charts import save_probe_chart
from foveal.atomic import write_json
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.distributed.preemption import LeaveRequest
from foveal.engines.build import set_matmul_and_determinism
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_RESULTS_DIR = "probes"
_log = logging.getLogger("foveal.finetune")

# Fitting function and feature column of each kind.
PROBE_METHODS: dict[ProbeKind, tuple[Callable[[ProbePlan, LayerFeatures], Resumable[Predictor]], str]] = {
    "linear": (fit_linear_probe, "pooled"),
    "logistic": (fit_logistic_probe, "pooled"),
    "attentive": (fit_attentive_probe, "patches"),
    "knn": (fit_knn_probe, "pooled"),
}


@dataclass(frozen=True)
class ProbeResult:
    """Result of a unit: top-1 on data.val with the hyperparameter ``choice``, the best on the holdout if any."""

    top1: float
    choice: float
    holdout_top1: float | None = None


def run_probes(plan: ProbePlan, run: Run) -> None:
    """Extract features, fit all units, and record the results. Every rank must call it."""
    set_matmul_and_determinism(plan.cfg.engine)
    cached = run.world.on_rank0(lambda: check_cached_features(plan, run.path))
    # Results are valid only with the features that they were computed from.
    results = run.world.on_rank0(lambda: _load_results(plan, run.path) if cached else {})
    run.start_attempt(len(results) + cached, num_parts=len(plan.kind_layer_pairs) + 1, noun="part")
    if not cached:
        run.progress.begin_part(1, "features")
        run.open_data_log()
        if leave := extract_and_cache_features(plan, run):
            return run.mark_preempted(0, leave)
        run.progress.finish_part(1, "cached")
    remaining = [unit for unit in plan.kind_layer_pairs if unit not in results]
    for start in range(0, len(remaining), run.world.size):
        units = remaining[start : start + run.world.size]
        run.progress.begin_part(len(results) + 2, "; ".join(map(_describe_unit, units)))
        new_results = _fit_units(plan, run, units)
        if isinstance(new_results, LeaveRequest):
            return run.mark_preempted(len(results) + 1, new_results)
        results |= new_results
        if run.world.rank == 0:
            _save_results(run.path, new_results)
        tops = [f"{result.top1:.4f}" for result in new_results.values()]
        run.progress.finish_part(len(results) + 1, f"top1 {', '.join(tops)}")
    metrics = select_layer_metrics(plan, results)
    run.notes = list(filter(None, _describe_list_edges(plan, metrics)))
    save_probe_chart(run, {unit: result.top1 for unit, result in results.items()}, plan.image_counts["val"])
    run.mark_finished(metrics)
    return None


def _describe_list_edges(plan: ProbePlan, metrics: dict[str, Any]) -> Iterator[str | None]:
    """Yield a sentence for every probe kind whose hyperparameter is at an end of its list."""
    for kind in dict.fromkeys(plan.probe.kinds):
        name, values = HYPERPARAMETERS[kind]
        chosen = metrics[f"{kind}_{name}"]
        yield describe_list_edge(f"{kind} probe", name, chosen, values(plan.probe), is_count=kind == "knn")


def _describe_unit(unit: tuple[ProbeKind, int]) -> str:
    kind, layer = unit
    return f"{kind}, block {layer}" if layer else kind


def _fit_units(
    plan: ProbePlan, run: Run, units: list[tuple[ProbeKind, int]]
) -> dict[tuple[ProbeKind, int], ProbeResult] | LeaveRequest:
    """Fit one unit on each of the first ranks; return the results on every rank, or the request to leave that came first."""
    rank, result = run.world.rank, None
    task = _fit_and_evaluate(plan, run.path, run.world.device, *units[rank]) if rank < len(units) else None
    with run.progress.activity("fitting") as activity:
        while run.world.any_rank(task is not None):
            run.watchdog.heartbeat(run.step, "probing")
            activity.advance(0)
            if leave := run.check_preemption():
                return leave
            task, result = run.world.run_all_or_raise(lambda t=task, r=result: (None, r) if t is None else _advance(t))
    gathered = zip(units, run.world.all_gather_objects(result), strict=False)
    return {unit: unit_result for unit, unit_result in gathered if unit_result is not None}


def _advance(task: Resumable[ProbeResult]) -> tuple[Resumable[ProbeResult] | None, ProbeResult | None]:
    """Run the next slice of a task; return (task, None), or (None, result) at its end."""
    try:
        next(task)
    except StopIteration as end:
        return None, end.value
    return task, None


def _fit_and_evaluate(
    plan: ProbePlan, run_dir: Path, device: torch.device, kind: ProbeKind, layer: int
) -> Resumable[ProbeResult]:
    """Fit on train, select the hyperparameter on the holdout, evaluate on val."""
    fit, column = PROBE_METHODS[kind]
    subsets = {
        name: load_layer_features(run_dir, name, plan.layers.index(layer), column, device) for name in plan.subsets
    }
    predict = yield from fit(plan, subsets["train"])
    candidates = HYPERPARAMETERS[kind][1](plan.probe)
    best, holdout_top1 = 0, None
    if "holdout" in subsets:
        accuracies = compute_top1_per_candidate((yield from predict(subsets["holdout"])), subsets["holdout"])
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        holdout_top1 = accuracies[best]
    top1 = compute_top1_per_candidate((yield from predict(subsets["val"])), subsets["val"])[best]
    return ProbeResult(top1, candidates[best], holdout_top1)


def compute_top1_per_candidate(predictions_GM: Tensor, features: LayerFeatures) -> list[float]:
    """Return the fraction of correct predictions of each candidate."""
    return ((predictions_GM == features.labels).sum(dim=1).double() / len(features)).tolist()


def select_layer_metrics(
    plan: ProbePlan, result_by_kind_layer: dict[tuple[ProbeKind, int], ProbeResult]
) -> dict[str, Any]:
    """Return each kind's metrics on the layer that is best on the holdout, and with ``probe.layers`` on each layer."""
    metrics: dict[str, Any] = {}
    for kind in dict.fromkeys(plan.probe.kinds):
        by_layer = {layer: result for (unit_kind, layer), result in result_by_kind_layer.items() if unit_kind == kind}
        best = max(by_layer, key=lambda layer: (by_layer[layer].holdout_top1 or 0.0, layer))  # ties: the deepest layer
        metrics |= _metrics_of(kind, by_layer[best])
        if plan.probe.layers is not None:
            metrics[f"{kind}_layer"] = best
            for layer in sorted(by_layer):
                metrics |= _metrics_of(kind, by_layer[layer], f"_layer_{layer:02d}")
    return metrics


def _metrics_of(kind: ProbeKind, result: ProbeResult, suffix: str = "") -> dict[str, float]:
    metrics = {f"{kind}_top1{suffix}": result.top1, f"{kind}_{HYPERPARAMETERS[kind][0]}{suffix}": result.choice}
    if result.holdout_top1 is not None:
        metrics[f"{kind}_holdout_top1{suffix}"] = result.holdout_top1
    return metrics


@dataclass(frozen=True)
class LinearProbeForecastLoss:
    """Objective that ``foveal plan`` traces: the frozen model's forward and a linear head on the last probed layer."""

    plan: ProbePlan
    extractor: FeatureExtractor

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of images."""
        return float(len(batch.labels))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pooled_SBF, _ = self.extractor(normalise(batch.images, self.plan.mean, self.plan.std))
        return F.cross_entropy(model(pooled_SBF[-1]).float(), batch.labels, reduction="sum"), {}


def build_forecast_setup(plan: ProbePlan, device: torch.device) -> TrainingSetup[LinearProbeForecastLoss]:
    """Return the setup whose cost ``foveal plan`` estimates.

    It runs the encoder in every step, whereas a probe runs it once per image.
    """
    frozen, extractor = build_feature_extractor(plan, device)
    head = nn.Linear(plan.feature_dim, len(plan.classes))
    return TrainingSetup(
        head, parameter_groups(head, plan.cfg.optim), LinearProbeForecastLoss(plan, extractor), (frozen,)
    )


def _result_file(run_dir: Path, unit: tuple[ProbeKind, int]) -> Path:
    kind, layer = unit
    return run_dir / _RESULTS_DIR / f"{kind}-{layer:02d}.json"


def _load_results(plan: ProbePlan, run_dir: Path) -> dict[tuple[ProbeKind, int], ProbeResult]:
    """Return the results that earlier attempts saved."""
    files = {unit: _result_file(run_dir, unit) for unit in plan.kind_layer_pairs}
    return {unit: ProbeResult(**json.loads(file.read_text())) for unit, file in files.items() if file.exists()}


def _save_results(run_dir: Path, results: dict[tuple[ProbeKind, int], ProbeResult]) -> None:
    (run_dir / _RESULTS_DIR).mkdir(exist_ok=True)
    for unit, result in results.items():
        write_json(_result_file(run_dir, unit), asdict(result))
