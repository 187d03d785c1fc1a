"""Probes of a frozen encoder: its features once, then every kind on every layer, each a small thing learned alone.

A unit (a kind on a layer) is learned by one rank, and units are dealt over the ranks: who learns it decides nothing, so
the numbers are the same on any number of ranks, and nothing waits on a gradient. All ranks breathe together between the
slices of their units, which keeps collectives short and lets them leave together. What a unit came to is written down;
an attempt that goes on finds the features and those, and nothing else was lost.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.probe.config import HYPERPARAMETERS, ProbeKind
from finetune.probe.features import (
    FeatureExtractor,
    LayerFeatures,
    build_feature_extractor,
    extract_features,
    has_cached_features,
    load_features,
)
from finetune.probe.heads import Predictor, Resumable, fit_attentive_probe, fit_linear_probe
from finetune.probe.knn import fit_knn_probe
from finetune.probe.logistic import fit_logistic_probe
from finetune.probe.plan import ProbePlan
from foveal.atomic import write_json
from foveal.data import Batch, normalise
from foveal.engines.build import set_matmul_precision
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run

_RESULTS_DIR = "probes"
_log = logging.getLogger("foveal.finetune")

# How each kind learns, and which file of features it reads.
PROBE_METHODS: dict[ProbeKind, tuple[Callable[[ProbePlan, LayerFeatures], Resumable[Predictor]], str]] = {
    "linear": (fit_linear_probe, "pooled"),
    "logistic": (fit_logistic_probe, "pooled"),
    "attentive": (fit_attentive_probe, "patches"),
    "knn": (fit_knn_probe, "pooled"),
}


@dataclass(frozen=True)
class ProbeResult:
    """What a unit came to: top-1 on data.val of the choice that was best on the holdout, if there was a choice."""

    top1: float
    choice: float
    holdout_top1: float | None = None


def run_probes(plan: ProbePlan, run: Run) -> None:
    """From the features to the numbers; every rank calls it."""
    set_matmul_precision(plan.cfg.engine)
    there = run.world.on_rank0(lambda: has_cached_features(plan, run.path))
    found = run.world.on_rank0(
        lambda: _load_results(plan, run.path) if there else {}
    )  # of features that are gone: void
    run.start_attempt(len(found) + there, total_steps=len(plan.kind_layer_pairs) + 1)
    if not there and not extract_features(plan, run):
        return run.end_preempted(0)
    run.progress.update(len(found) + 1, "features are kept")
    left = [unit for unit in plan.kind_layer_pairs if unit not in found]
    for start in range(0, len(left), run.world.size):
        together = left[start : start + run.world.size]
        news = _fit_units(plan, run, together)
        if news is None:
            return run.end_preempted(len(found) + 1)
        found |= news
        if run.world.rank == 0:
            _save_results(run.path, news)
        for (kind, layer), told in news.items():
            run.progress.update(len(found) + 1, f"{kind}{f', block {layer}' if layer else ''}: top-1 {told.top1:.3f}")
    run.mark_finished(summarize_results(plan, found))
    return None


def _fit_units(
    plan: ProbePlan, run: Run, units: list[tuple[ProbeKind, int]]
) -> dict[tuple[ProbeKind, int], ProbeResult] | None:
    """What these units came to, one on each of the first ranks; nothing if the run was asked to leave."""
    rank, found = run.world.rank, None
    work = _fit_and_evaluate(plan, run.path, run.world.device, *units[rank]) if rank < len(units) else None
    while run.world.any_rank(work is not None):
        run.watchdog.heartbeat(run.step, "probing")
        if run.check_preemption():
            return None
        work, found = run.world.run_all_or_raise(lambda w=work, f=found: (None, f) if w is None else _advance(w))
    told = zip(units, run.world.all_gather_objects(found), strict=False)
    return {unit: each for unit, each in told if each is not None}


def _advance(task: Resumable[ProbeResult]) -> tuple[Resumable[ProbeResult] | None, ProbeResult | None]:
    """Work until it breathes, or is done: (what is left, what came of it)."""
    try:
        next(task)
    except StopIteration as end:
        return None, end.value
    return task, None


def _fit_and_evaluate(
    plan: ProbePlan, run_dir: Path, device: torch.device, kind: ProbeKind, layer: int
) -> Resumable[ProbeResult]:
    """Learn on train, choose by the holdout, and only then look at val."""
    fit, column = PROBE_METHODS[kind]
    parts = {name: load_features(run_dir, name, plan.layers.index(layer), column, device) for name in plan.subsets}
    guess = yield from fit(plan, parts["train"])
    choices, best, held = HYPERPARAMETERS[kind][1](plan.probe), 0, None
    if "holdout" in parts:
        right = compute_top1((yield from guess(parts["holdout"])), parts["holdout"])
        best = max(range(len(right)), key=right.__getitem__)
        held = right[best]
    top1 = compute_top1((yield from guess(parts["val"])), parts["val"])[best]
    return ProbeResult(top1, choices[best], held)


def compute_top1(predictions_GM: Tensor, features: LayerFeatures) -> list[float]:
    """The share of right guesses, for each choice."""
    return ((predictions_GM == features.labels).sum(dim=1).double() / len(features)).tolist()


def summarize_results(plan: ProbePlan, unit_results: dict[tuple[ProbeKind, int], ProbeResult]) -> dict[str, Any]:
    """The numbers by name: each kind's on the layer that was best on the holdout, then layer by layer where asked for."""
    numbers: dict[str, Any] = {}
    for kind in dict.fromkeys(plan.probe.kinds):
        mine = {layer: told for (name, layer), told in unit_results.items() if name == kind}
        best = max(mine, key=lambda layer: (mine[layer].holdout_top1 or 0.0, layer))  # of equal ones the deepest
        numbers |= _metrics_of(kind, mine[best])
        if plan.probe.layers is not None:
            numbers[f"{kind}_layer"] = best
            for layer in sorted(mine):
                numbers |= _metrics_of(kind, mine[layer], f"_layer_{layer:02d}")
    return numbers


def _metrics_of(kind: ProbeKind, result: ProbeResult, suffix: str = "") -> dict[str, float]:
    numbers = {f"{kind}_top1{suffix}": result.top1, f"{kind}_{HYPERPARAMETERS[kind][0]}{suffix}": result.choice}
    return numbers | ({} if result.holdout_top1 is None else {f"{kind}_holdout_top1{suffix}": result.holdout_top1})


@dataclass(frozen=True)
class LinearProbeLoss:
    """What a forecast follows: the frozen model's forward, and a linear head on the last layer that is read."""

    plan: ProbePlan
    extractor: FeatureExtractor

    def batch_weight(self, batch: Batch) -> float:
        """The images."""
        return float(len(batch.labels))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pooled_SBF, _ = self.extractor(normalise(batch.images, self.plan.mean, self.plan.std))
        return F.cross_entropy(model(pooled_SBF[-1]).float(), batch.labels, reduction="sum"), {}


def build(plan: ProbePlan, device: torch.device) -> TrainingSetup[LinearProbeLoss]:
    """What a probe takes of a rank, for ``foveal plan``; it counts the encoder in every step, where a probe asks it once."""
    frozen, look = build_feature_extractor(plan, device)
    head = nn.Linear(plan.feature_dim, len(plan.classes))
    return TrainingSetup(head, parameter_groups(head, plan.cfg.optim), LinearProbeLoss(plan, look), (frozen,))


def _result_file(run: Path, unit: tuple[ProbeKind, int]) -> Path:
    return run / _RESULTS_DIR / f"{unit[0]}-{unit[1]:02d}.json"


def _load_results(plan: ProbePlan, run: Path) -> dict[tuple[ProbeKind, int], ProbeResult]:
    """What earlier attempts have written down."""
    files = {unit: _result_file(run, unit) for unit in plan.kind_layer_pairs}
    return {unit: ProbeResult(**json.loads(file.read_text())) for unit, file in files.items() if file.exists()}


def _save_results(run: Path, results: dict[tuple[ProbeKind, int], ProbeResult]) -> None:
    (run / _RESULTS_DIR).mkdir(exist_ok=True)
    for unit, told in results.items():
        write_json(_result_file(run, unit), asdict(told))
