"""The report at the end of a run: every result, in lines that a terminal of 80 columns shows as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from foveal.training.report import RunReport, format_results, log_report, read_report, wrap_lines, write_finished
from pretrain.config import PretrainConfig

ROWS = [{"step": step, "loss": 2.0 / step, "lr": 0.1} for step in range(1, 41)]


@pytest.fixture
def cfg() -> PretrainConfig:
    return PretrainConfig.load(Path("configs/pretrain/digits.yaml"), ["tracking.uri=sqlite:///runs/mlflow.db"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a run of 40 steps that is not finished yet."""
    folder = tmp_path / "run"
    for file in ("export/a/card.json", "export/b/card.json", "pictures/reconstruction-00000040.png"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / "refused.jsonl").write_text("{}\n{}\n")
    rows = [*ROWS, {"step": 40, "val_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def finish(run_dir: Path, results: dict[str, float], notes: tuple[str, ...] = ()) -> dict[str, Any]:
    file = write_finished(
        run_dir,
        results,
        ROWS[-1],
        {"seed": 0},
        notes,
        training_seconds=70.0,
        evaluation_seconds=9.0,
        attempt_seconds=95.0,
    )
    return json.loads(file.read_text())


def test_results_are_first_in_the_file_of_a_finished_run(run_dir: Path) -> None:
    facts = finish(run_dir, {"val_top1": 0.75, "loss": 0.5})
    assert list(facts) == ["summary", "seconds", "evaluation_seconds", "total_seconds", "science"]
    assert list(facts["summary"].items()) == [("val_top1", 0.75), ("loss", 0.5), ("step", 40), ("lr", 0.1)]


def test_the_report_of_a_pretraining(run_dir: Path, cfg: PretrainConfig) -> None:
    finish(run_dir, {"val_loss": 1.0, "val_knn_top1": 0.3})
    assert read_report("pretrain", run_dir, cfg).lines() == [
        "finished  40 steps in 1 min 35 s",
        "          training 1 min 10 s at 146 images/s, evaluating 9 s",
        f"loss      2.0000 at step 1, {(2 / 39 + 2 / 40) / 2:.4f} over the last 2 steps",
        "results   val_loss      1.0000    val_knn_top1  0.3000",
        "refused   2 updates: refused.jsonl",
        f"run       {run_dir}",
        f"export    {run_dir}/export/a",
        f"          {run_dir}/export/b",
        f"pictures  {run_dir}/pictures/ (1 file)",
        "curves    mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
        f"next      foveal init finetune --data data/digits --init {run_dir}/export/a",
    ]


def test_a_run_of_an_earlier_version_has_a_report_without_the_times_that_it_did_not_write(
    tmp_path: Path, cfg: PretrainConfig
) -> None:
    (tmp_path / "finished.json").write_text(json.dumps({"seconds": 61.0, "science": {}, "summary": {"val_top1": 0.5}}))
    assert read_report("finetune", tmp_path, cfg).lines()[:3] == [
        "finished  earlier",
        "results   val_top1  0.5000",
        f"run       {tmp_path}",
    ]


def test_notes_stand_after_the_results(run_dir: Path, cfg: PretrainConfig) -> None:
    facts = finish(run_dir, {"val_top1": 0.75}, ("the chosen rate is the highest of its list",))
    assert list(facts)[:2] == ["summary", "notes"]
    assert "note      the chosen rate is the highest of its list" in read_report("finetune", run_dir, cfg).lines()


def test_a_damaged_file_costs_the_report_alone(
    tmp_path: Path, cfg: PretrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "finished.json").write_text("no JSON")
    log_report("pretrain", tmp_path, cfg)
    assert f"{tmp_path} is finished; its report cannot be written" in caplog.text


def test_results_with_a_spread_are_a_table() -> None:
    arms = {"mae": (0.83, 0.82, 0.84, 0.01), "scratch": (0.384567, 0.36, 0.42, 0.003)}
    names = ("top1", "top1_lowest", "top1_highest", "lr_per_256")
    results = {f"{arm}_{name}": value for arm, row in arms.items() for name, value in zip(names, row, strict=True)}
    assert format_results(results) == [
        "                mean  lowest  highest",
        "mae_top1      0.8300  0.8200   0.8400",
        "scratch_top1  0.3846  0.3600   0.4200",
        "mae_lr_per_256      0.0100    scratch_lr_per_256   0.003",
    ]
    folds = {"folds": 5.0, **{f"fold_top1_{name}": 0.5 for name in ("mean", "std", "lowest", "highest")}}
    assert format_results(folds) == [
        "             mean     std  lowest  highest",
        "fold_top1  0.5000  0.5000  0.5000   0.5000",
        "folds  5",
    ]


def test_all_results_are_there_and_fit() -> None:
    results = {f"val_iou/class number {number}": number / 33 for number in range(32)} | {"best_step": 120, "mAP": 1e-5}
    lines = RunReport("finetune", Path("runs/x"), results).lines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for name, value in (("val_iou/class number 31", "0.9394"), ("best_step", "120"), ("mAP", "1e-05")):
        assert f"{name} {value}" in text
    assert text.count("val_iou/") == 32


def test_a_long_line_of_a_plan_goes_on_under_its_text() -> None:
    path = "/a/path/with-hyphens/" + "x" * 60
    assert wrap_lines([f"data      {path}, 1,437 images in train of which some are left", "lr        0.1"]) == [
        f"data      {path},",
        "          1,437 images in train of which some are left",
        "lr        0.1",
    ]
