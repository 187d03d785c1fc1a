"""Cross-validation: each fold runs once, in its task of an array, and one task aggregates the results."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.fit import fit
from finetune.multirun import cross_validation
from finetune.multirun.cross_validation import cross_validate, dispatch_folds, fold_configs, summarize_folds
from finetune.task import FinetunePlan
from finetune.train import plan_finetuning, train
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import ConfigError, FovealError, LaunchError, RunInUseError
from foveal.slurm import SlurmArrayTask
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.run import Run
from foveal.training.run_directory import open_run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
Fit = Callable[[FinetunePlan, Run], None]


def settings(digits: Path, folder: Path, **overrides: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "seed": 5,
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4, "samples_per_class": 8},
        "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 16},
        "optim": {},
        "engine": {"kind": "plain"},
        "run": {"dir": str(folder)},
        "cross_validation": {"count": 2, "repeats": 2},
        "tracking": {"uri": None},
    }
    return FinetuneConfig.from_dict(tree | overrides, "here")


class Stand:
    """Stand-in for training: records the fold and reports a fixed accuracy."""

    def __init__(self) -> None:
        self.trained: list[str] = []

    def __call__(self, plan: FinetunePlan, run: Run) -> None:
        self.trained.append(run.path.name)
        assert plan.cfg.data.fold is not None
        run.start_attempt()
        run.mark_finished({"fold_top1": 0.2 * plan.cfg.data.fold.number + 0.1 * (plan.cfg.seed - 5)})


def execute(cfg: FinetuneConfig, fit: Fit, *, aggregate: bool = False) -> bool:
    """Execute a config as the command line does; return whether the run finished.

    ``fit`` is called for a fold, or with ``aggregate`` for the cross-validation's run.
    """
    plan = plan_finetuning(cfg, 1)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        if run is None:
            return True
        if cfg.cross_validation is None or aggregate:
            fit(plan, run)
        else:
            cross_validate(plan, run, fit)
    return run.is_finished


def summary(run: Path) -> dict[str, float]:
    return json.loads((run / "finished.json").read_text())["summary"]


@pytest.fixture
def become_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the current thread a task of a Slurm array."""
    thread_state = threading.local()
    monkeypatch.setattr(cross_validation, "read_slurm_array_task", lambda: getattr(thread_state, "task", None))

    def become(number: int, count: int, lowest: int = 0, highest: int | None = None) -> None:
        thread_state.task = SlurmArrayTask(number, count, lowest, count - 1 if highest is None else highest)

    return become


def test_the_spread_of_folds() -> None:
    summary = summarize_folds([{"fold_top1": 0.5, "holdout_top1": 1.0}, {"fold_top1": 0.7, "holdout_top1": 1.0}])
    top1 = {"mean": 0.6, "std": 0.02**0.5, "lowest": 0.5, "highest": 0.7}
    holdout = {"mean": 1.0, "std": 0.0, "lowest": 1.0, "highest": 1.0}
    expected = {f"fold_top1_{name}": value for name, value in top1.items()}
    expected |= {f"holdout_top1_{name}": value for name, value in holdout.items()}
    assert summary == pytest.approx({"folds": 2} | expected)


def test_every_fold_is_a_run_and_a_row_of_the_whole(digits: Path, tmp_path: Path) -> None:
    cfg, stand = settings(digits, tmp_path / "run"), Stand()
    assert execute(cfg, stand)
    assert stand.trained == ["seed5-fold0", "seed5-fold1", "seed6-fold0", "seed6-fold1"]
    *rows, last = read_rows_without_time(tmp_path / "run/metrics.jsonl")
    assert rows == [
        {"step": n, "fold_top1": pytest.approx(top1)} for n, top1 in enumerate((0.0, 0.2, 0.1, 0.3), start=1)
    ]
    assert summary(tmp_path / "run") == {name: value for name, value in last.items() if name != "step"}
    assert last["fold_top1_mean"] == pytest.approx(0.15)
    assert (last["folds"], last["fold_top1_lowest"], last["fold_top1_highest"]) == (4, 0, pytest.approx(0.3))
    assert execute(cfg, Stand())
    with pytest.raises(FovealError, match=r"was made with other science: cross_validation\.count"):
        execute(settings(digits, tmp_path / "run", cross_validation={"count": 3, "repeats": 2}), stand)


def test_a_fold_that_left_in_the_middle_comes_to_the_same_numbers(digits: Path, tmp_path: Path) -> None:
    """With real training. The second attempt resumes the preempted fold and does not repeat the finished one."""

    def interrupted(plan: FinetunePlan, run: Run) -> None:
        started.append(run.path.name)
        run.preemption.stop_reason = "SIGUSR1" if len(started) == 2 else None
        fit(plan, run)

    started: list[str] = []
    cfg = settings(digits, tmp_path / "left", cross_validation={"count": 2}, evaluate_every=2)
    assert not execute(cfg, interrupted)
    assert execute(cfg, interrupted)
    assert started == ["seed5-fold0", "seed5-fold1", "seed5-fold1"]
    attempts = tmp_path / "left/folds/seed5-fold1/attempts"
    assert json.loads((attempts / "0001.end.json").read_text())["step"] == 1
    assert json.loads((attempts / "0002.start.json").read_text())["step"] == 1
    uninterrupted = settings(digits, tmp_path / "whole", cross_validation={"count": 2}, evaluate_every=2)
    with open_run("finetune", plan_finetuning(uninterrupted, 1), ALONE, Preemption(ALONE)) as run:
        assert run is not None
        train(plan_finetuning(uninterrupted, 1), run)
    assert summary(tmp_path / "left") == summary(tmp_path / "whole")
    rows = [read_rows_without_time(tmp_path / name / "folds/seed5-fold1/metrics.jsonl") for name in ("left", "whole")]
    resumed, expected = (
        {(row["step"], row.get("loss"), row.get("fold_top1")) for row in run_rows} for run_rows in rows
    )
    assert resumed == expected
    assert not any("val_top1" in row for row in rows[0])


def test_tasks_share_the_folds_and_the_last_closes(
    digits: Path, tmp_path: Path, become_task: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "foveal")
    cfg, stand = settings(digits, tmp_path / "run"), Stand()
    steps = [
        ((4, 5), []),
        ((1, 3), ["seed5-fold1"]),
        ((0, 3), ["seed5-fold0", "seed6-fold1"]),
        ((1, 2), []),  # a task of another array, which assigns the remaining folds differently
        ((0, 2), ["seed6-fold0"]),
    ]
    for task, trained in steps:
        assert not (tmp_path / "run/finished.json").exists()
        stand.trained.clear()
        become_task(*task)
        dispatch_folds(cfg, ALONE, lambda run_cfg: execute(run_cfg, stand))
        assert stand.trained == trained
    assert "task 4 of the array has nothing to do: there are 4 folds" in caplog.text
    assert "1 of 4 folds are left to other tasks; the last closes the run" in caplog.text
    assert summary(tmp_path / "run")["folds"] == 4
    become_task(0, 3)  # requeued after the run finished
    dispatch_folds(cfg, ALONE, lambda run_cfg: execute(run_cfg, stand))
    assert not (tmp_path / "run/attempts/0002.json").exists()


def test_a_task_that_is_asked_to_leave_leaves_the_rest(
    digits: Path, tmp_path: Path, become_task: Callable[..., None]
) -> None:
    become_task(0, 2)
    executed: list[str] = []
    dispatch_folds(
        settings(digits, tmp_path / "run"), ALONE, lambda run_cfg: bool(executed.append(str(run_cfg.run.dir)))
    )
    assert executed == [f"{tmp_path}/run/folds/seed5-fold0"]


class Pair:
    """Two tasks that find every fold finished at the same time; the one with the lease waits for the other's try."""

    def __init__(self, *, dies: bool) -> None:
        self.dies, self.closed, self.died = dies, list[int](), 0
        self._looked, self._here, self._refused = threading.Barrier(2), threading.local(), threading.Event()

    def run(self, cfg: FinetuneConfig) -> bool:
        if cfg.cross_validation is not None and not hasattr(self._here, "looked"):
            self._here.looked = True
            self._looked.wait(120)
        try:
            return execute(cfg, self._close if cfg.cross_validation else Stand(), aggregate=True)
        except RunInUseError:
            self._refused.set()
            raise

    def _close(self, plan: FinetunePlan, run: Run) -> None:
        assert self._refused.wait(120)
        self.closed.append(threading.get_ident())
        if self.dies and len(self.closed) == 1:
            raise RuntimeError
        cross_validate(plan, run, Stand())

    def task(self, cfg: FinetuneConfig, become: Callable[[], None]) -> None:
        become()
        try:
            dispatch_folds(cfg, ALONE, self.run)
        except RuntimeError:
            self.died += 1
        else:
            assert cfg.run.dir is not None
            assert (Path(cfg.run.dir) / "finished.json").exists()


@pytest.mark.parametrize("dies", [False, True])
def test_of_two_that_finish_at_once_one_closes_and_the_other_waits_for_it(
    dies: bool, digits: Path, tmp_path: Path, become_task: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the task with the lease dies, the other aggregates."""
    monkeypatch.setattr(cross_validation, "_POLL_SECONDS", 0.01)
    cfg, pair = settings(digits, tmp_path / "run", cross_validation={"count": 2}), Pair(dies=dies)
    for fold_cfg in fold_configs(cfg):
        execute(fold_cfg, Stand())
    with ThreadPoolExecutor(2) as pool:
        for task in [pool.submit(pair.task, cfg, partial(become_task, number, 2)) for number in range(2)]:
            task.result()
    assert (len(pair.closed), len(set(pair.closed)), pair.died) == (1 + dies, 1 + dies, dies)
    assert summary(tmp_path / "run")["folds"] == 2
    assert [row["step"] for row in read_rows_without_time(tmp_path / "run/metrics.jsonl")][:2] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"cross_validation": {"count": 1}}, r"cross_validation\.count: input should be greater than or equal to 2"),
        (
            {"early_stopping": {"metric": "fold_top1", "patience": 2}, "evaluate_every": 3},
            "would stop a fold by the data that it is evaluated on",
        ),
        ({"cross_validation": {"count": 200}}, r"class \d \('\d'\) has 1\d\d samples, too few for 200 folds"),
        ({"batch": {"global_size": 4096}}, "batch"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused(
    overrides: dict[str, Any], sentence: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(FovealError, match=sentence) as error:
        plan_finetuning(settings(digits, tmp_path / "run", **overrides), 1)
    assert "\n" not in str(error.value)


def test_evaluations_of_folds_need_no_split_of_their_own(digits: Path, tmp_path: Path) -> None:
    cfg = settings(digits, tmp_path / "run", evaluate_every=3)
    tree = cfg.to_dict()
    tree["data"]["val"] = "nowhere"
    lines = plan_finetuning(FinetuneConfig.from_dict(tree, "here"), 1).summary_lines()
    assert not [line for line in lines if line.startswith("evaluate")]


def test_arrays_that_cannot_share_the_folds_are_refused(
    digits: Path, tmp_path: Path, become_task: Callable[..., None]
) -> None:
    cfg = settings(digits, tmp_path / "run")
    become_task(3, 1, 3, 3)
    with pytest.raises(LaunchError, match=r"from 3 to 3, .*: use --array=0-0, also to repeat a task"):
        plan_finetuning(cfg, 1)
    become_task(1, 5, 1, 5)
    with pytest.raises(LaunchError, match=r"from 1 to 5, .*: use --array=0-4"):
        plan_finetuning(cfg, 1)
    become_task(0, 5)
    with pytest.raises(ConfigError, match=r"run\.fresh=true and a Slurm array exclude each other"):
        plan_finetuning(settings(digits, tmp_path / "run", run={"dir": str(tmp_path), "fresh": True}), 1)
    assert plan_finetuning(cfg, 1).num_runs == 4
