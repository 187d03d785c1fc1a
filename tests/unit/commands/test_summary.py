"""The table at the end of a pipeline: what it says, and what it refuses to say."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named

from foveal.commands import summary
from foveal.commands.summary import read_completed_pipeline
from foveal.errors import CheckpointError

PRETRAIN = {"step": 1200.0, "loss": 0.123456, "images_per_second": 1234.5, "lr": 0.0}
COMPARED = {
    f"{arm}_{name}": value
    for arm, values in (("mae", (0.83, 0.82, 0.84, 0.01)), ("scratch", (0.38, 0.36, 0.42, 0.003)))
    for name, value in zip(("top1", "top1_lowest", "top1_highest", "lr_per_256"), values, strict=True)
}


def run(folder: Path, at: int, numbers: dict[str, float] | None, seconds: float = 61.6, **science: Any) -> None:
    """A run's directory as a finished run leaves it; unfinished without numbers. ``at`` is when it finished."""
    folder.mkdir(parents=True)
    (folder / "science.json").write_text(json.dumps(science))
    if numbers is not None:
        (folder / "finished.json").write_text(json.dumps({"seconds": seconds, "science": science, "summary": numbers}))
        os.utime(folder / "finished.json", (at, at))


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    pipeline = tmp_path / "demo"
    run(pipeline / "pretrain", 100, PRETRAIN)
    run(pipeline / "compare", 300, COMPARED, **{"data.samples_per_class": 2, "trials.repeats": 3})
    run(pipeline / "distill", 200, {"step": 600.0, "loss": 0.05})
    run(pipeline / "compare" / "trials" / "mae-seed0", 250, PRETRAIN)  # a run inside a run is no stage
    (pipeline / "pretrain" / "pictures").mkdir()
    (pipeline / "pretrain" / "pictures" / "sheet.png").touch()
    (pipeline / "logs").mkdir()
    return pipeline


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed, without frames and with single spaces: a long title is broken into lines."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.argv", ["summary", *words])
    summary.main()
    return " ".join(re.sub("[^\\x00-\\x7f]", " ", capsys.readouterr().out).split())


def test_stages_stand_in_the_order_in_which_they_finished(demo: Path) -> None:
    assert list(read_completed_pipeline(demo)) == ["pretrain", "distill", "compare"]


def test_the_table_has_every_stage_and_every_arm(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(monkeypatch, capsys, str(demo))
    stages = "pretrain 1200 0.1235 1,234 62 s distill 600 0.0500 62 s compare trials 62 s"
    assert f"stages run steps loss images/s training {stages} compare: 2 labels" in text
    assert "compare: 2 labels a class, 3 seeds, each arm's own best rate start top-1 lowest to highest" in text
    assert "mae 0.830 0.820 to 0.840 0.01 scratch 0.380 0.360 to 0.420 0.003" in text
    assert f"pictures {demo / 'pretrain' / 'pictures'} MLflow {demo.parent / 'mlflow.db'} (make ui opens it)" in text
    assert "mae-seed0" not in text
    assert "took" not in text


def test_all_labels_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "compare", 1, COMPARED, **{"data.samples_per_class": None, "trials.repeats": 1})
    assert "compare: all labels, 1 seeds, each arm's own best rate" in said(monkeypatch, capsys, str(tmp_path))


def test_how_long_it_took(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("foveal.commands.summary.time.time", lambda: 1000.0)
    assert "took 4 min 10 s" in said(monkeypatch, capsys, str(demo), "--since", "750")


def test_an_unfinished_run_is_named_and_no_table_is_printed(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(demo / "late", 0, None)
    monkeypatch.setattr("sys.argv", ["summary", str(demo)])
    with pytest.raises(SystemExit) as caught:
        summary.main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"foveal: {demo / 'late'} not finished; start the pipeline again and it continues\n"


def test_a_pipeline_without_runs_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no runs$"):
        read_completed_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere holds no runs$"):
        read_completed_pipeline(tmp_path / "nowhere")


def test_a_run_that_was_killed_after_its_last_step_still_has_its_numbers(
    configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """Killed between the last checkpoint and finished.json: nothing is left to train, and the summary is the same."""
    folder = tmp_path / "pipeline" / "run"
    one_rank.train(stage_named("distill"), configs["distill"], folder, "engine.kind=plain")
    whole = read_completed_pipeline(folder.parent)["run"]["summary"]
    assert {"step", "loss", "images_per_second"} <= whole.keys()
    (folder / "finished.json").unlink()
    one_rank.train(stage_named("distill"), configs["distill"], folder, "engine.kind=plain")
    assert read_completed_pipeline(folder.parent)["run"]["summary"] == whole
