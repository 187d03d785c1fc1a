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

from finetune.probe.config import CHOICES, Kind
from finetune.probe.features import Look, Part, keep, kept, looked_at, read_part
from finetune.probe.heads import Breaths, Guess, attentive, linear
from finetune.probe.knn import knn
from finetune.probe.logistic import logistic
from finetune.probe.plan import ProbePlan
from foveal.atomic import write_json
from foveal.data import Batch, normalise
from foveal.engines.build import set_products
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import Parts
from foveal.training.run import Run

_FOLDER = "probes"
_log = logging.getLogger("foveal.finetune")

# How each kind learns, and which file of features it reads.
KINDS: dict[Kind, tuple[Callable[[ProbePlan, Part], Breaths[Guess]], str]] = {
    "linear": (linear, "pooled"),
    "logistic": (logistic, "pooled"),
    "attentive": (attentive, "patches"),
    "knn": (knn, "pooled"),
}


@dataclass(frozen=True)
class Told:
    """What a unit came to: top-1 on data.val of the choice that was best on the holdout, if there was a choice."""

    top1: float
    choice: float
    holdout_top1: float | None = None


def probe(plan: ProbePlan, run: Run) -> None:
    """From the features to the numbers; every rank calls it."""
    set_products(plan.cfg.engine)
    there = run.world.once(lambda: kept(plan, run.path))
    found = run.world.once(lambda: _told(plan, run.path) if there else {})  # of features that are gone: void
    run.begin(len(found) + there, total=len(plan.units) + 1)
    if not there and not keep(plan, run):
        return run.leave(0)
    run.progress.tell(len(found) + 1, "features are kept")
    left = [unit for unit in plan.units if unit not in found]
    for start in range(0, len(left), run.world.size):
        together = left[start : start + run.world.size]
        news = _learned(plan, run, together)
        if news is None:
            return run.leave(len(found) + 1)
        found |= news
        if run.world.rank == 0:
            _write(run.path, news)
        for (kind, layer), told in news.items():
            run.progress.tell(len(found) + 1, f"{kind}{f', block {layer}' if layer else ''}: top-1 {told.top1:.3f}")
    run.finish(results(plan, found))
    return None


def _learned(plan: ProbePlan, run: Run, units: list[tuple[Kind, int]]) -> dict[tuple[Kind, int], Told] | None:
    """What these units came to, one on each of the first ranks; nothing if the run was asked to leave."""
    rank, found = run.world.rank, None
    work = _unit(plan, run.path, run.world.device, *units[rank]) if rank < len(units) else None
    while run.world.any(work is not None):
        run.watch.beat(run.step, "probing")
        if run.asked_to_leave():
            return None
        work, found = run.world.together(lambda w=work, f=found: (None, f) if w is None else _slice(w))
    told = zip(units, run.world.gather(found), strict=False)
    return {unit: each for unit, each in told if each is not None}


def _slice(work: Breaths[Told]) -> tuple[Breaths[Told] | None, Told | None]:
    """Work until it breathes, or is done: (what is left, what came of it)."""
    try:
        next(work)
    except StopIteration as end:
        return None, end.value
    return work, None


def _unit(plan: ProbePlan, run: Path, device: torch.device, kind: Kind, layer: int) -> Breaths[Told]:
    """Learn on train, choose by the holdout, and only then look at val."""
    fit, column = KINDS[kind]
    parts = {name: read_part(run, name, plan.layers.index(layer), column, device) for name in plan.parts}
    guess = yield from fit(plan, parts["train"])
    choices, best, held = CHOICES[kind][1](plan.probe), 0, None
    if "holdout" in parts:
        right = accuracies((yield from guess(parts["holdout"])), parts["holdout"])
        best = max(range(len(right)), key=right.__getitem__)
        held = right[best]
    top1 = accuracies((yield from guess(parts["val"])), parts["val"])[best]
    return Told(top1, choices[best], held)


def accuracies(guesses_GM: Tensor, part: Part) -> list[float]:
    """The share of right guesses, for each choice."""
    return ((guesses_GM == part.labels).sum(dim=1).double() / len(part)).tolist()


def results(plan: ProbePlan, found: dict[tuple[Kind, int], Told]) -> dict[str, Any]:
    """The numbers by name: each kind's on the layer that was best on the holdout, then layer by layer where asked for."""
    numbers: dict[str, Any] = {}
    for kind in dict.fromkeys(plan.probe.kinds):
        mine = {layer: told for (name, layer), told in found.items() if name == kind}
        best = max(mine, key=lambda layer: (mine[layer].holdout_top1 or 0.0, layer))  # of equal ones the deepest
        numbers |= _named(kind, mine[best])
        if plan.probe.layers is not None:
            numbers[f"{kind}_layer"] = best
            for layer in sorted(mine):
                numbers |= _named(kind, mine[layer], f"_layer_{layer:02d}")
    return numbers


def _named(kind: Kind, told: Told, layer: str = "") -> dict[str, float]:
    numbers = {f"{kind}_top1{layer}": told.top1, f"{kind}_{CHOICES[kind][0]}{layer}": told.choice}
    return numbers | ({} if told.holdout_top1 is None else {f"{kind}_holdout_top1{layer}": told.holdout_top1})


@dataclass(frozen=True)
class Readable:
    """What a forecast follows: the frozen model's forward, and a linear head on the last layer that is read."""

    plan: ProbePlan
    look: Look

    def weight(self, batch: Batch) -> float:
        """The images."""
        return float(len(batch.labels))

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pooled_SBF, _ = self.look(normalise(batch.images, self.plan.mean, self.plan.std))
        return F.cross_entropy(model(pooled_SBF[-1]).float(), batch.labels, reduction="sum"), {}


def parts(plan: ProbePlan, device: torch.device) -> Parts[Readable]:
    """What a probe takes of a rank, for ``foveal plan``; it counts the encoder in every step, where a probe asks it once."""
    frozen, look = looked_at(plan, device)
    head = nn.Linear(plan.width, len(plan.classes))
    return Parts(head, parameter_groups(head, plan.cfg.optim), Readable(plan, look), (frozen,))


def _file(run: Path, unit: tuple[Kind, int]) -> Path:
    return run / _FOLDER / f"{unit[0]}-{unit[1]:02d}.json"


def _told(plan: ProbePlan, run: Path) -> dict[tuple[Kind, int], Told]:
    """What earlier attempts have written down."""
    files = {unit: _file(run, unit) for unit in plan.units}
    return {unit: Told(**json.loads(file.read_text())) for unit, file in files.items() if file.exists()}


def _write(run: Path, news: dict[tuple[Kind, int], Told]) -> None:
    (run / _FOLDER).mkdir(exist_ok=True)
    for unit, told in news.items():
        write_json(_file(run, unit), asdict(told))
