"""Trials: the same labels for every arm, learning rates selected on the holdout only, no trial run twice."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.multirun.trials import _summarize_trials, run_trials
from finetune.plan import _resolve_classes, plan_training, trial_config
from finetune.task import FinetunePlan
from finetune.tasks.classify import Classification
from foveal.data.sampling.subset import select_subset
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import ConfigError, DataError, ExportError
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.tracking.tracker import Tracker
from foveal.training.lease import list_attempts
from foveal.training.run import Run
from foveal.training.run_directory import open_run
from foveal.weights.export import Card, write_export

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=1, heads=2)
RATES, REPEATS = (1e-2, 3e-2), 2


def seeds(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"holdout_top1": holdout, "val_top1": val} for holdout, val in pairs]


def test_the_rate_is_chosen_by_the_holdout_and_judged_by_val() -> None:
    """Arm a: the learning rate that is best on val is not selected. Arm b has its own best learning rate."""
    summaries = {
        ("a", 0.1): seeds((0.6, 0.10), (0.5, 0.30)),
        ("a", 0.2): seeds((0.7, 0.90), (0.3, 0.90)),
        ("b", 0.1): seeds((0.2, 0.80), (0.2, 0.80)),
        ("b", 0.2): seeds((0.1, 0.60), (0.9, 0.50)),
    }
    assert _summarize_trials(summaries) == pytest.approx(
        {
            "a_lr_per_256": 0.1,
            "a_top1": 0.2,
            "a_top1_lowest": 0.1,
            "a_top1_highest": 0.3,
            "a_holdout_top1": 0.55,
            "b_lr_per_256": 0.2,
            "b_top1": 0.55,
            "b_top1_lowest": 0.5,
            "b_top1_highest": 0.6,
            "b_holdout_top1": 0.5,
        }
    )


def test_val_never_decides_between_rates() -> None:
    """The selection does not depend on the accuracies on val."""
    holdout = {0.1: (0.3, 0.5), 0.2: (0.6, 0.1), 0.3: (0.2, 0.7)}
    for shift in range(3):
        summaries = {
            ("a", lr): seeds(*((holdout_top1, ((index + shift) % 3) / 2) for holdout_top1 in pair))
            for index, (lr, pair) in enumerate(holdout.items())
        }
        assert _summarize_trials(summaries)["a_lr_per_256"] == 0.3


def test_without_a_holdout_no_accuracy_on_it_is_made_up() -> None:
    chosen = _summarize_trials({("a", 0.1): [{"val_top1": 0.5}, {"val_top1": 0.7}]})
    assert chosen["a_top1"] == pytest.approx(0.6)
    assert "a_holdout_top1" not in chosen


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of an untrained encoder."""
    folder = tmp_path_factory.mktemp("teacher") / "export"
    torch.manual_seed(0)
    module = build_encoder(TINY, image_size=16, channels=1)
    write_export(folder, module.state_dict(), Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,)))
    return folder


def settings(digits: Path, encoder: Path, folder: Path, **overrides: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "seed": 5,
        "epochs": 3,
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4}
        | {"samples_per_class": 2, "holdout_per_class": 3, "mean": [0.3], "std": [0.4]},
        "model": TINY.to_dict(),
        "batch": {"global_size": 8},
        "optim": {},
        "engine": {"kind": "plain"},
        "run": {"dir": str(folder)},
        "tracking": {"uri": None},
        "trials": {
            "arms": {"mae": str(encoder), "scratch": None},
            "lr_per_256": list(RATES),
            "repeats": REPEATS,
        },
    }
    return FinetuneConfig.from_dict(tree | overrides, "here")


def test_arms_differ_in_their_start_and_in_nothing_else(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path / "run")
    for repeat in range(REPEATS):
        mae, scratch = (plan_training(trial_config(cfg, arm, repeat, RATES[1]), 1) for arm in ("mae", "scratch"))
        mae_science, scratch_science = mae.science_settings(), scratch.science_settings()
        differing = {
            name
            for name in mae_science | scratch_science
            if mae_science.get(name, "no") != scratch_science.get(name, "no")
        }
        assert {name for name in differing if name != "model" and not name.startswith("model.")} == {"inherited.init"}
        assert (mae.cfg.seed, mae.cfg.optim.lr_per_256) == (5 + repeat, RATES[1])
        assert (mae.total_steps, mae.classes) == (scratch.total_steps, scratch.classes)
        assert mae.encoder == scratch.encoder
        assert mae.cfg.init == str(encoder)
        assert scratch.cfg.init is None
        assert mae.cfg.run.dir != scratch.cfg.run.dir
        assert Path(mae.cfg.run.dir or "").parent == tmp_path / "run" / "trials"


def labels_of(plan: FinetunePlan) -> dict[str, list[int]]:
    """Return the sample ids of the train and holdout subsets, and the sample order of the first steps."""
    cfg = plan.cfg
    ids = {}
    for subset in ("train", "holdout"):
        selected = select_subset(plan.dataset, cfg.data, split="train", subset=subset, seed=cfg.seed)
        assert selected.split_positions is not None
        ids[subset] = selected.split_positions.tolist()
    order = plan.training_set.order
    return ids | {
        "order": np.concatenate([order.assign_slots(step, 0, 8).subset_positions for step in range(4)]).tolist()
    }


def test_arms_share_their_labels_and_seeds_draw_others(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path / "run")
    ids = {
        (arm, repeat): labels_of(plan_training(trial_config(cfg, arm, repeat, RATES[0]), 1))
        for arm in ("mae", "scratch")
        for repeat in range(REPEATS)
    }
    for repeat in range(REPEATS):
        assert ids["mae", repeat] == ids["scratch", repeat]
        assert (len(ids["mae", repeat]["train"]), len(ids["mae", repeat]["holdout"])) == (20, 30)
        assert not set(ids["mae", repeat]["train"]) & set(ids["mae", repeat]["holdout"])
    for name in ("train", "holdout", "order"):
        assert ids["mae", 0][name] != ids["mae", 1][name], name


class Fit:
    """Stand-in for training: records the trial, reports an accuracy, and is preempted after a number of trials."""

    def __init__(self, leave_after: int = 99) -> None:
        self.trained: list[str] = []
        self.outer_trackers: list[Tracker | None] = []
        self.leave_after = leave_after

    def __call__(self, plan: FinetunePlan, run: Run) -> None:
        if len(self.trained) == self.leave_after:
            run.mark_preempted(1)
            return
        self.trained.append(run.path.name)
        self.outer_trackers.append(run.outer_tracker)
        if plan.stop_step == plan.total_steps:
            better = plan.cfg.init is not None
            run.mark_finished({"val_top1": 0.5 + 0.25 * better, "holdout_top1": 10 * plan.cfg.optim.lr_per_256})


def run_attempt(cfg: FinetuneConfig, fit: Fit) -> bool:
    """Run one attempt of the trials; return whether it was preempted."""
    plan = plan_training(cfg, 1)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        if run is None:
            return False
        run_trials(plan, run, fit)
        return run.is_preempted


def test_finished_trials_are_not_repeated(digits: Path, encoder: Path, tmp_path: Path) -> None:
    cfg = settings(digits, encoder, tmp_path / "run")
    trials = [f"{arm}-seed{seed}-lr{lr:g}" for arm in ("mae", "scratch") for lr in RATES for seed in (5, 6)]
    first, second, third = Fit(leave_after=3), Fit(), Fit()
    assert run_attempt(cfg, first)
    assert first.trained == trials[:3]
    assert (list_attempts(tmp_path / "run")[0].reason or "").endswith(f": 3 of {len(trials)} trials finished")
    assert not (tmp_path / "run" / "finished.json").exists()
    assert not run_attempt(cfg, second)
    assert second.trained == trials[3:]
    summary = json.loads((tmp_path / "run" / "finished.json").read_text())["summary"]
    assert (summary["mae_top1"], summary["scratch_top1"], summary["mae_lr_per_256"]) == (0.75, 0.5, RATES[1])
    assert not run_attempt(cfg, third)
    assert third.trained == []
    assert None not in first.outer_trackers, "the outer run's uploader delivers a trial"
    assert len(set(map(id, first.outer_trackers))) == 1


@pytest.mark.parametrize(
    ("overrides", "kind", "sentence"),
    [
        ({"model": None}, ConfigError, "model is missing: without init, the encoder from scratch must be stated"),
        (
            {"trials": {"arms": {"a": "nowhere"}, "lr_per_256": [1e-2]}},
            ExportError,
            "nowhere is no export: it has no card.json",
        ),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_it_begins(
    overrides: dict[str, Any], kind: type[Exception], sentence: str, digits: Path, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=sentence):
        plan_training(settings(digits, encoder, tmp_path / "run", **overrides), 1)


@pytest.mark.parametrize(
    ("train", "val", "sentence"),
    [
        ([0, 1, 2], [0, 1], "split 'train' has label 2, but there are 2 classes"),
        ([0, 1], [5], "split 'val' has label 5, but there are 2 classes"),
        ([0, 1], [-1, -1], "split 'val'"),  # accuracy over no images would divide by zero at the end of the run
        ([-1, -1], [0, 1], "split 'train'"),  # every step would be 0 / 0 and skipped
    ],
)
def test_labels_that_cannot_be_learned_are_refused_in_the_plan(
    train: list[int], val: list[int], sentence: str, digits: Path, encoder: Path, tmp_path: Path
) -> None:
    labels = {"train": np.array(train), "val": np.array(val)}
    dataset: Any = SimpleNamespace(folder="here", classes=("cat", "dog"), labels=labels.__getitem__)
    with pytest.raises(DataError, match=sentence):
        _resolve_classes(dataset, settings(digits, encoder, tmp_path), Classification())
