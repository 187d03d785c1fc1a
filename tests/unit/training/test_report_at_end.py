"""A run that finishes writes its report and that of its pipeline; what goes wrong there is one warning."""

import logging
from pathlib import Path

import pytest
from ranks import Ranks, stage_named
from run_folders import training_rows, write_run

from foveal.training import launch


def test_stages_of_a_pipeline_write_their_reports(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    shared = ("engine.kind=plain", "log.report=true", f"run.pipeline={chain}")
    one_rank.train(stage_named("pretrain"), configs["pretrain"], chain / "first", *shared)
    assert (chain / "first" / "report.html").exists()
    assert "1 stage " in (chain / "report.html").read_text()
    # The last stage lies elsewhere, and knows its pipeline all the same.
    init = f"init={chain}/first/export"
    one_rank.train(stage_named("finetune"), configs["finetune"], tmp_path / "elsewhere" / "second", init, *shared)
    page = (chain / "report.html").read_text()
    assert "2 stages" in page and "from first as init" in page


def test_a_run_that_is_told_not_to_writes_none(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one_rank.train(stage_named("pretrain"), configs["pretrain"], run, "engine.kind=plain", "log.report=false")
    assert (run / "finished.json").exists() and not (run / "report.html").exists()


def test_an_error_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", rows=training_rows(steps=2), summary={"val_top1": 0.5})
    (run / "report.html").mkdir()
    with caplog.at_level(logging.INFO, "foveal"):
        launch._write_reports(run, None)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is finished, and its report is not written" in record.getMessage()
    assert "foveal report" in record.getMessage()
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), RecursionError("deep")])
def test_whatever_happens_the_run_is_finished(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Path:
        raise error

    monkeypatch.setattr("foveal.report.report.write_report", fail)
    launch._write_reports(tmp_path, None)
    assert len(caplog.records) == 1
