"""A run that finishes writes its report and that of its pipeline; what goes wrong there is one warning."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named
from run_folders import training_rows, write_run

from foveal.report import report
from foveal.runs.record import RunRecord
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

    monkeypatch.setattr("foveal.report.report.write_report_at_end", fail)
    launch._write_reports(tmp_path, None)
    assert len(caplog.records) == 1


def test_a_damaged_stage_is_named_on_the_page_of_the_pipeline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chain = tmp_path / "chain"
    settings = {"run": {"pipeline": f"{chain}/"}}
    write_run(chain / "first", rows=training_rows(steps=2), summary={"val_top1": 0.5})
    write_run(tmp_path / "beside", settings=settings, summary={"val_top1": 0.5})
    last = write_run(tmp_path / "elsewhere" / "last", rows=training_rows(steps=2), summary={"val_top1": 0.5})
    (chain / "first" / "tags.json").write_text("{")
    with caplog.at_level(logging.INFO, "foveal"):
        launch._write_reports(last, str(chain))
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    page = (chain / "report.html").read_text()
    assert "2 of 3 finished" in page and "first/tags.json is damaged" in page
    (tmp_path / "beside" / "plan.json").write_text("{")  # a neighbour that may be a stage
    launch._write_reports(last, str(chain))
    page = (chain / "report.html").read_text()
    assert "1 of 3 finished" in page and "beside/plan.json is damaged" in page


def test_the_report_of_the_run_is_not_that_of_its_pipeline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(31):
        write_run(tmp_path / "chain" / f"run{number}", summary={"val_top1": 0.5})
    run = tmp_path / "chain" / "run30"
    launch._write_reports(run, str(tmp_path / "chain"))
    assert (run / "report.html").exists()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the report of its pipeline is not written (CheckpointError: " in record.getMessage()


def test_metrics_are_read_once_and_not_while_a_job_waits_for_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run(tmp_path / "chain" / "run", rows=training_rows(steps=2), summary={"val_top1": 0.5})
    reads: list[Path] = []
    read_rows = RunRecord.rows

    def count_reads(record: RunRecord) -> Iterator[dict[str, Any]]:
        reads.append(record.path)
        return read_rows(record)

    monkeypatch.setattr(RunRecord, "rows", count_reads)
    launch._write_reports(run, str(run.parent))
    assert (run.parent / "report.html").exists()
    assert reads == [run]
    monkeypatch.setattr(report, "_MAX_METRICS_BYTES_AT_END", 10)
    launch._write_reports(run, str(run.parent))
    assert reads == [run]
    assert ["of metrics.jsonl would be read" in record.getMessage() for record in caplog.records] == [True, True]
