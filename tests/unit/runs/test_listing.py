"""Runs in a list: what they were made of in short, their order, and trials and folds on request."""

import time
from pathlib import Path

import pytest
from run_directories import end_attempt, make_run

from foveal.runs import record
from foveal.runs.inputs import DatasetInput, RunInputs, write_inputs
from foveal.runs.listing import describe_data, describe_model, list_with_status, sort_runs
from foveal.runs.record import read_run
from foveal.training.lease import AttemptRecord


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs, begun in the order b, c, a; b and a have a metric of one name, c has a loss."""
    for name, summary in (("b", {"val_top1": 0.5}), ("c", {"val_loss": 0.2}), ("a", {"val_top1": 0.7})):
        end_attempt(make_run(tmp_path / name, stage="distill" if name == "c" else "finetune", finished=summary))
    end_attempt(make_run(tmp_path / "a" / "trials" / "t1", finished={"val_top1": 0.9}))
    return tmp_path


def names(folder: Path, sort: str = "date", **options: object) -> list[str]:
    listing = list_with_status(folder, time.time(), **options)  # type: ignore[arg-type]
    return [run.status.name for run in sort_runs(listing.runs, sort)]  # type: ignore[arg-type]


def test_a_run_whose_attempts_cannot_be_read_costs_only_itself(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / "link").symlink_to(runs / "a")  # not followed
    list_readable = record.list_attempts

    def list_attempts(run: Path) -> list[AttemptRecord]:
        if run.name == "c":
            raise PermissionError(13, "Permission denied", str(run / "attempts"))
        return list_readable(run)

    monkeypatch.setattr(record, "list_attempts", list_attempts)
    assert [run.name for run in record.list_runs(runs)] == ["c", "b", "a"]
    listing = list_with_status(runs, time.time())
    assert [run.status.name for run in listing.runs] == ["b", "a"]
    assert [path.name for path, _ in listing.unreadable] == ["c"]


def test_orders(runs: Path) -> None:
    assert names(runs) == ["b", "c", "a"]
    assert names(runs, "name") == ["a", "b", "c"]
    assert names(runs, "metric") == ["c", "a", "b"]
    end_attempt(make_run(runs / "0"))
    assert names(runs, "metric") == ["c", "a", "b", "0"]


def test_a_stage_nested_runs_and_sizes(runs: Path) -> None:
    assert names(runs, stage="distill") == ["c"]
    assert names(runs, "name", with_nested=True) == ["a", "t1", "b", "c"]
    listing = list_with_status(runs / "a", time.time(), with_nested=True, with_size=True)
    assert [run.outer for run in listing.runs] == [None, runs / "a"]
    outer, inner = (run.num_bytes for run in listing.runs)
    assert outer is not None
    assert inner is not None
    assert outer > inner > 100
    (runs / "b" / "plan.json").write_text("{")
    listing = list_with_status(runs, time.time())
    assert [run.status.name for run in listing.runs] == ["c", "a"]
    assert [path for path, _ in listing.unreadable] == [runs / "b"]


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"model": {"name": "vit_base"}}, "vit_base"),
        ({"model": None, "backbone": {"name": "resnet18"}}, "resnet18"),
        ({"init": "runs/mae/export"}, "init mae"),
        ({"students": [{"name": "s"}, {"name": "t"}]}, "2 students"),
        ({"trials": {"arms": {"scratch": None, "pretrained": "x"}}}, "2 arms"),
        ({"seed": 1}, ""),
    ],
)
def test_models_in_short(tmp_path: Path, settings: dict[str, object], model: str) -> None:
    assert describe_model(read_run(make_run(tmp_path / "run", settings=settings))) == model


def test_data_in_short(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", settings={"data": {"path": "s3://user:" + "word@bucket/sets/flowers/"}})
    assert describe_data(read_run(run)) == "flowers"
    sets = (
        DatasetInput("training", "digits", "x", "train", "", 1, 1),
        DatasetInput("training", "more", "x", "train", "", 1, 1),
        DatasetInput("evaluation", "other", "x", "val", "", 1, 1),
    )
    write_inputs(run, RunInputs(str(run), "pretrain", sets))
    assert describe_data(read_run(run)) == "digits + more"
    (run / "inputs.json").write_text("{")
    assert describe_data(read_run(run)) == "flowers"
    assert describe_data(read_run(make_run(tmp_path / "none", settings={"seed": 1}))) == ""
