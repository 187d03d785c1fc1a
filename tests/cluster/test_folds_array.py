"""A Slurm array that shares the folds of a cross-validation, on two nodes; one of its tasks is asked to leave."""

import json
from pathlib import Path

import pytest
from harness import Cluster

from foveal.data.pack import pack_digits

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"array": "0-1", "nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "1", "gpus-per-node": "0"}
TINY = ["model.width=16", "model.depth=1", "model.heads=2", "log.every=1", "tracking.uri=null", "engine.kind=plain"]
RUN = [
    "cross_validation.count=2",
    "data.samples_per_class=20",
    "data.workers=0",
    "epochs=40",  # a fold is not over before it is asked to leave, on a busy machine too
    "run.dir=runs/folds",
    *TINY,
]


def rows(fold: Path) -> int:
    file = fold / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def ends(fold: Path) -> list[int]:
    """The step at which each attempt at a fold ended."""
    return [json.loads(end.read_text())["step"] for end in sorted((fold / "attempts").glob("*.end.json"))]


def test_tasks_share_the_folds_and_one_that_leaves_is_requeued_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The task that leaves is the one with the number of the whole array: to requeue that would start both again."""
    for name in ("slurm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    pack_digits(tmp_path / "data/digits")
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    quiet = {"OMP_NUM_THREADS": "1", "FOVEAL_PREFLIGHT": "0"}
    array = cluster.submit("slurm/finetune.sh", "digits_folds", *RUN, options=options, cwd=tmp_path, env=quiet)
    tasks = [f"{array}_{number}" for number in range(2)]
    folds = [tmp_path / f"runs/folds/folds/seed0-fold{number}" for number in range(2)]
    cluster.until(lambda: rows(folds[1]) > 3, f"{tasks[1]} reports steps", timeout=120)
    assert cluster.job(tasks[1])["JobId"] == array
    cluster.run("scancel", "--signal=USR1", tasks[1])
    ended = [cluster.wait(task) for task in tasks]
    said = "\n".join(cluster.output(task) for task in tasks)
    assert [(job["JobState"], job["Restarts"]) for job in ended] == [("COMPLETED", "0"), ("COMPLETED", "1")], said
    assert (len(ends(folds[0])), len(ends(folds[1]))) == (1, 2)
    left, finished = ends(folds[1])
    assert 3 < left < finished
    summaries = [json.loads((fold / "finished.json").read_text())["summary"] for fold in folds]
    whole = json.loads((tmp_path / "runs/folds/finished.json").read_text())["summary"]
    assert whole["folds"] == 2
    assert whole["fold_top1_mean"] == pytest.approx(sum(each["fold_top1"] for each in summaries) / 2)
    assert said.count("of 2 folds are left to other tasks") == 1
    assert len(list((tmp_path / "runs/folds/attempts").glob("*.end.json"))) == 1
