"""Whether a disturbed run is the run that was left alone: its losses, its weights and the images that it consumed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from foveal.data.records.audit import open_ledger
from foveal.tracking.tail import read_step_rows

_ROUNDING = 1e-5  # relative, between runs on different numbers of ranks
COMPARED = ("loss", "lr", "grad_norm")


@dataclass(frozen=True)
class Verdict:
    """What was compared, and whether it is equal."""

    checks: tuple[tuple[str, bool, str], ...]

    @property
    def good(self) -> bool:
        return all(passed for _, passed, _ in self.checks)

    @property
    def lines(self) -> list[str]:
        return [f"- {what}: {'equal' if passed else 'DIFFERENT'} ({detail})" for what, passed, detail in self.checks]


def compare(
    alone: Path, disturbed: Path, *, exact: bool, delivered: Sequence[tuple[str, int, float]] | None = None
) -> Verdict:
    """Losses and weights bit for bit where ``exact``, else within rounding; the ledgers always exactly.

    ``delivered``: the names, steps and values that a tracking server holds, twice what came twice; what a run that went
    back had delivered before may be there too, once.
    """
    checks = [_curve(alone, disturbed, exact), _weights(alone, disturbed, exact), _ledger(alone, disturbed)]
    if delivered is not None:
        checks.append(_tracked(disturbed, delivered, exact))
    return Verdict(tuple(checks))


def _tracked(run: Path, delivered: Sequence[tuple[str, int, float]], exact: bool) -> tuple[str, bool, str]:
    """Every row of the run is in the store, with its value; what is there besides lies behind steps that were void."""
    wanted = {(name, int(row["step"])): row[name] for row in _rows(run) for name in COMPARED}
    void = {
        step
        for each in read_step_rows(run / "rollbacks.jsonl")
        for step in range(each["to"] + 1, max(each["refused"]) + 1)
    }
    held: dict[tuple[str, int], list[float]] = {}
    for name, step, value in delivered:
        held.setdefault((name, step), []).append(value)
    rounding = 0.0 if exact else _ROUNDING
    right = held.keys() == wanted.keys() and all(
        any(abs(value - wanted[place]) <= rounding * abs(value) for value in values)
        and len(values) <= (2 if place[1] in void else 1)
        for place, values in held.items()
    )
    return "MLflow", right, f"{len(delivered)} values for {len(wanted)}"


def _curve(alone: Path, disturbed: Path, exact: bool) -> tuple[str, bool, str]:
    ours, theirs = (_rows(run) for run in (disturbed, alone))
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        return "losses", False, f"{len(ours)} rows for {len(theirs)}, or in another order"
    pairs = [(one[name], other[name]) for one, other in zip(ours, theirs, strict=True) for name in COMPARED]
    worst = max(abs(one - other) / max(abs(other), 1e-30) for one, other in pairs)
    return "losses", worst <= (0.0 if exact else _ROUNDING), f"{len(ours)} steps, largest difference {worst:.1e}"


def _weights(alone: Path, disturbed: Path, exact: bool) -> tuple[str, bool, str]:
    ours, theirs = (load_file(run / "export/model.safetensors") for run in (disturbed, alone))
    if ours.keys() != theirs.keys():
        return "weights", False, "other names"
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    near = all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in ours)
    return "weights", worst == 0.0 if exact else near, f"{len(ours)} tensors, largest difference {worst:.1e}"


def _ledger(alone: Path, disturbed: Path) -> tuple[str, bool, str]:
    ours, theirs = (open_ledger(run) for run in (disturbed, alone))
    if (ours.after_step, ours.last_step) != (theirs.after_step, theirs.last_step):
        return "ledger", False, f"steps {ours.after_step}-{ours.last_step} for {theirs.after_step}-{theirs.last_step}"
    one, other = ours.read_rows(ours.after_step, ours.last_step), theirs.read_rows(theirs.after_step, theirs.last_step)
    return "ledger", bool(np.array_equal(one, other)), f"{one.size} samples in {len(ours.attempts)} attempts"


def _rows(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
