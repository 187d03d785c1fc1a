"""`--check`: what a start would do, refused as the start refuses it, and nothing written."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import Ranks, stage_named

from foveal.errors import CheckpointError, ConfigError, RunInUseError
from foveal.training import preview
from foveal.training.cli import load_config
from foveal.training.lease import acquire_lease
from foveal.training.lease_holder import current_holder
from foveal.training.preview import preview_start

PLAIN = "engine.kind=plain"


@pytest.fixture(scope="module")
def run(configs, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 3 of 22."""
    folder = tmp_path_factory.mktemp("preview") / "run"
    one_rank.train(
        stage_named("pretrain"), configs["pretrain"], folder, PLAIN, "checkpoint.every=2", "run.stop_at_step=3"
    )
    return folder


def plan_of(configs: dict[str, Path], run_dir: Path, *overrides: str) -> Any:
    stage = stage_named("pretrain")
    words = [f"run.dir={run_dir}", PLAIN, *overrides]
    return stage.functions.build_plan(load_config(stage.config_class, "pretrain", str(configs["pretrain"]), words), 1)


def start_lines(configs: dict[str, Path], run_dir: Path, *overrides: str) -> list[str]:
    return preview_start(plan_of(configs, run_dir, *overrides), stage_named("pretrain").functions.build)[1]


def files(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_start_begins_resumes_or_is_refused(configs, run: Path, tmp_path: Path) -> None:
    before = files(run)
    assert start_lines(configs, tmp_path / "new") == [f"start     new run in {tmp_path / 'new'}"]
    assert not (tmp_path / "new").exists()
    (line,) = start_lines(configs, run)
    assert line.startswith(f"start     would resume from step 3 of 22 (attempt 2 in {run}): step-00000003-attempt-0001")
    assert line.endswith("written by 1 rank under plain, fp32")
    with pytest.raises(CheckpointError, match=r"made with other science: epochs \(was 1, is 2\)"):
        start_lines(configs, run, "epochs=2")
    fork = (f"run.fork={run}", "epochs=2")
    assert start_lines(configs, tmp_path / "fork", *fork) == [f"start     new run in {tmp_path / 'fork'}"]
    with pytest.raises(CheckpointError, match=r"run.fork=.* keeps the shapes of the run it begins from: .* in shape"):
        start_lines(configs, tmp_path / "fork", *fork, "model.width=48", "model.heads=3")
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match=r"cannot be a run directory \(File exists\)"):
        start_lines(configs, tmp_path / "notes")
    assert files(run) == before


def test_a_living_attempt_a_loop_and_a_torn_checkpoint(
    configs, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = acquire_lease(run, current_holder(1), max_attempts_without_progress=9)
    with pytest.raises(RunInUseError, match="is being written by attempt 2"):
        start_lines(configs, run)
    lease.record_start(3)
    lease.record_end_and_release("a rank was lost", 5)
    _, loop = start_lines(configs, run, "run.max_attempts_without_progress=1")
    assert loop.startswith(
        f"beware    the next start will be refused: {run}: each of the last 1 attempts ended without"
    )
    assert not (run / "attempts" / "0003.json").exists()
    monkeypatch.setattr(preview, "disk_shortage", lambda *_: "no room")
    assert start_lines(configs, run)[-1] == "beware    no room", "the checkpoint that there is can be continued"
    with pytest.raises(CheckpointError, match="no room"):
        start_lines(configs, run.parent / "new")
    newest = run / "checkpoints" / "step-00000003-attempt-0001" / "state.json"
    newest.write_text(newest.read_text() + " ")
    (line, _) = start_lines(configs, run)
    assert "would resume from step 2 of 22" in line
    assert "is torn or corrupt; the one before it is used" in caplog.text
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(CheckpointError, match="is whole, and an attempt at this run began at step 3"):
        start_lines(configs, run)
    assert not (run / "checkpoints").exists()
    (run / "elsewhere").rename(run / "checkpoints")


def test_a_finished_run_and_a_run_of_parts(configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(configs, tmp_path)
    (tmp_path / "finished.json").write_text(json.dumps({"science": plan.science_settings()}))
    assert "was finished before: nothing to do" in start_lines(configs, tmp_path)[0]
    (tmp_path / "finished.json").unlink()
    (tmp_path / "science.json").write_text(json.dumps(plan.science_settings()))
    monkeypatch.setattr(type(plan), "has_checkpoints", False)
    assert "what is finished in it is not repeated" in start_lines(configs, tmp_path)[0]


def test_a_model_that_cannot_be_built_is_refused(configs, tmp_path: Path) -> None:
    def refuse(*_: object) -> SimpleNamespace:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        preview_start(replace(plan_of(configs, tmp_path / "new")), refuse)  # type: ignore[arg-type]
