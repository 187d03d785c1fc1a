"""A run that its evaluations steer: the same rates, the same stop and the same export, however it was interrupted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks, stage_named
from safetensors.torch import load_file

from finetune.tasks.classify import ClassificationLoss
from foveal.data.records.ledger import ROW_DTYPE, ledger_rows_path
from foveal.distributed.preemption import LeaveRequest
from foveal.distributed.world import World
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.run import Run

# SGD at a rate that is too high at first: of 44 steps it takes 20, the best evaluation is after 12, and the rate drops.
STEERED = (
    *("init=null", "model={name: vit_tiny_patch16_224, patch: 4, width: 32, depth: 2, heads: 2}", "drop_path=0.1"),
    *("optim.name=sgd", "optim.lr_per_256=1.0", "optim.layer_decay=1.0", "label_smoothing=0.0"),
    *("optim.schedule=plateau", "optim.plateau_patience=2", "evaluate_every=2", "epochs=2"),
    *("data.holdout_per_class=4", "early_stopping={metric: holdout_loss, patience: 4}", "engine.kind=accelerate"),
    *("checkpoint.keep=9",),
)
STOP, BEST = 20, 12
TOLD = ("loss", "lr", "grad_norm", "val_top1", "val_loss", "holdout_top1", "holdout_loss", "best_step")


def train(ranks: Ranks, config: Path, run: Path, *words: str) -> list[dict[str, float]]:
    return ranks.train(stage_named("finetune"), config, run, *STEERED, *words)


def left_at(world: World, config: str, run: str, step: int) -> None:
    """Fine-tune until a step, and be asked to leave there, before its evaluation."""
    stage = stage_named("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "check_preemption", lambda run, _: LeaveRequest() if run.step == step else None)
        run_stage(
            stage,
            load_config(stage.config_class, "finetune", config, [f"run.dir={run}", "tracking.uri=null", *STEERED]),
            world,
        )


def tear(run: Path, step: int) -> None:
    """What a kill leaves of a checkpoint whose disk lost it."""
    (newest,) = (run / "checkpoints").glob(f"step-{step:08d}-*")
    next(newest.glob("*.safetensors")).write_bytes(b"torn")


def told(run: Path) -> dict[str, dict[float, float]]:
    """Every number by step, each told once."""
    rows = read_rows_without_time(run / "metrics.jsonl")
    columns = {name: [(row["step"], row[name]) for row in rows if name in row] for name in TOLD}
    assert all(len(dict(column)) == len(column) for column in columns.values())
    return {name: dict(sorted(column)) for name, column in columns.items()}


def summary_of(run: Path) -> dict[str, float]:
    summary = json.loads((run / "finished.json").read_text())["summary"]
    return {name: value for name, value in summary.items() if name in ("step", *TOLD)}


def outcome(run: Path) -> tuple[Any, ...]:
    """What was told, the summary, and the exported weights."""
    return told(run), summary_of(run), (run / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(configs, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    train(one_rank, configs["finetune"], run, "data.ledger=true")
    return run


@pytest.mark.thorough
def test_it_stops_and_leaves_the_best(alone: Path, configs, one_rank: Ranks, tmp_path: Path) -> None:
    losses, rates = (told(alone)[name] for name in ("holdout_loss", "lr"))
    assert list(losses) == list(range(2, STOP + 1, 2))
    assert min(losses, key=losses.__getitem__) == BEST
    assert list(rates) == list(range(1, STOP + 1))
    assert {step: rate for step, rate in rates.items() if rate != rates.get(step - 1)} == pytest.approx(
        {1: 0.25, 7: 0.025, 17: 0.0025}
    )
    summary = summary_of(alone)
    assert (summary["step"], summary["best_step"], summary["holdout_loss"]) == (STOP, BEST, losses[BEST])
    card = json.loads((alone / "export" / "card.json").read_text())
    assert (card["step"], card["metrics"]["holdout_loss"]) == (BEST, losses[BEST])
    assert not (alone / "kept").exists()
    # Its weights are those of a run that ends there.
    train(one_rank, configs["finetune"], tmp_path / "short", f"run.stop_at_step={BEST}")
    ours = load_file(alone / "export" / "model.safetensors")
    kept = load_file(tmp_path / "short" / "kept" / f"{BEST:08d}" / "model.safetensors")
    assert all(ours[name].equal(kept[name]) for name in ours)


def test_interruptions_change_nothing(alone: Path, configs, one_rank: Ranks, tmp_path: Path) -> None:
    """Stopped, killed after the best evaluation with the checkpoint behind it lost, and asked to leave where it stops."""
    run = tmp_path / "run"
    train(one_rank, configs["finetune"], run, "run.stop_at_step=5")
    train(one_rank, configs["finetune"], run, "run.stop_at_step=13")
    tear(run, 13)
    one_rank.call(left_at, str(configs["finetune"]), str(run), STOP)
    assert not (run / "finished.json").exists()
    train(one_rank, configs["finetune"], run)
    assert outcome(run) == outcome(alone)


@pytest.mark.thorough
def test_ranks_stop_together(alone: Path, configs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    """From one rank to two: the same stop and the same best, the numbers to rel 1e-5."""
    run = tmp_path / "run"
    train(one_rank, configs["finetune"], run, "run.stop_at_step=7")
    train(two_ranks, configs["finetune"], run)
    ours, theirs = told(run), told(alone)
    for name, column in theirs.items():
        assert ours[name] == pytest.approx(column, rel=1e-5), name
    assert summary_of(run) == pytest.approx(summary_of(alone), rel=1e-5)


def poisoned(world: World, config: str, words: list[str], draws: list[int]) -> None:
    """Fine-tune with an objective that is NaN on batches with one of ``draws``."""
    clean = ClassificationLoss.__call__

    def spoilt(self, model, batch) -> Any:
        total, numbers = clean(self, model, batch)
        return (
            total * float("nan") if torch.isin(batch.sample_keys.cpu(), torch.tensor(draws)).any() else total
        ), numbers

    stage = stage_named("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationLoss, "__call__", spoilt)
        run_stage(stage, load_config(stage.config_class, "finetune", config, words), world)


@pytest.mark.thorough
def test_going_back_forgets_what_was_evaluated_since(alone: Path, configs, one_rank: Ranks, tmp_path: Path) -> None:
    """Three bad steps, with evaluations among them: the outcome is that of a run that never had their batches."""
    rows = np.fromfile(ledger_rows_path(alone / "ledger", 1, 0), dtype=ROW_DTYPE)
    draws = [int(rows["draw"][rows["step"] == step][0]) for step in (8, 9, 10)]
    words = [f"run.dir={tmp_path / 'run'}", "tracking.uri=null", *STEERED, "checkpoint.every=6", "epochs=1"]
    one_rank.call(poisoned, str(configs["finetune"]), words, draws)
    replay = tmp_path / "replay"
    replay.mkdir()
    entry = {"time": 0.0, "to": 0, "refused": [], "batches": [7, 8, 9]}
    (replay / "rollbacks.jsonl").write_text(json.dumps(entry) + "\n")
    train(one_rank, configs["finetune"], replay, "epochs=1")
    assert outcome(tmp_path / "run") == outcome(replay)
