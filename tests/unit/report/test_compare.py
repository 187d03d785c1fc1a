"""Runs side by side: settings that differ, results with the best marked, curves of both in one picture."""

import json
import re
from pathlib import Path

import pytest
from hostile_run import HOSTILE, SECRET, PageReader, write_hostile_run
from run_folders import training_rows, write_run
from typer.testing import CliRunner

from foveal.cli import app
from foveal.errors import ConfigError
from foveal.report.compare import compare_runs, find_best


def two_runs(folder: Path) -> tuple[Path, Path]:
    slow = write_run(
        folder / "slow",
        settings={"optim": {"lr_per_256": 1e-4}, "evaluate_every": 5},
        rows=training_rows(),
        summary={"val_loss": 0.5, "val_top1": 0.8, "val_top1_lowest": 0.7, "val_top1_highest": 0.9},
    )
    fast = write_run(
        folder / "fast",
        settings={"optim": {"lr_per_256": 1e-3}, "evaluate_every": 10, "batch": {"global_size": 16}},
        rows=training_rows(10),
        summary={"val_loss": 0.4, "val_top1": 0.6},
    )
    return slow, fast


def test_settings_that_differ_science_first(tmp_path: Path) -> None:
    comparison = compare_runs(two_runs(tmp_path))
    assert [(row.name, row.cells) for row in comparison.science] == [
        ("batch.global_size", ("8", "16")),
        ("optim.lr_per_256", ("0.0001", "0.001")),
    ]
    assert [row.name for row in comparison.machine] == ["evaluate_every"]


def test_the_best_is_marked_by_its_direction(tmp_path: Path) -> None:
    best = {row.name: row.best for row in compare_runs(two_runs(tmp_path)).results}
    assert best == {"val_loss": (1,), "val_top1": (0,)}


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("val_loss", [2.0, 1.0, None], (1,)),
        ("val_top1", [2.0, 1.0, 2.0], (0, 2)),
        ("val_patch_distance", [0.2, 0.1], (1,)),
        ("val_top1", [1.0, 1.0], ()),
        ("val_top1", [1.0, None], ()),
        ("val_top1", [float("nan"), 0.1, 0.2], (2,)),
    ],
)
def test_direction(name: str, values: list[float | None], best: tuple[int, ...]) -> None:
    assert find_best(name, values) == best


def test_runs_of_several_stages_are_compared_where_they_can_be(tmp_path: Path) -> None:
    pretraining, _ = two_runs(tmp_path)
    settings = {"pooling": "avg", "optim": {"lr_per_256": 1e-2}}
    classifier = write_run(
        tmp_path / "c", stage="finetune", settings=settings, summary={"val_loss": 0.1, "val_top1": 0.9}
    )
    comparison = compare_runs([pretraining, classifier])
    assert [row.name for row in comparison.science] == ["optim.lr_per_256"]
    assert {row.name: row.best for row in comparison.results} == {"val_loss": (), "val_top1": (1,)}


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name / "pretrain")
    comparison = compare_runs([tmp_path / "one" / "pretrain", tmp_path / "two" / "pretrain"])
    assert comparison.names == ("one/pretrain", "two/pretrain")


@pytest.mark.parametrize("number", [1, 9])
def test_too_few_or_too_many_runs_are_one_sentence(number: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 to 8 different runs"):
        compare_runs([write_run(tmp_path / f"run{at}") for at in range(number)] * 2)


def test_the_command_prints_tables_and_writes_a_page_on_request(tmp_path: Path) -> None:
    slow, fast = two_runs(tmp_path)
    said = CliRunner().invoke(app, ["compare", str(slow), str(fast)])
    assert said.exit_code == 0, said.output
    assert re.search(r"val_top1 +0\.8 \(0\.7 to 0\.9\) \* +0\.6", said.output)
    assert re.search(r"steps +20 steps +10 of 20 steps", said.output)
    assert not list(tmp_path.rglob("*.html"))
    page = tmp_path / "compare.html"
    assert CliRunner().invoke(app, ["compare", str(slow), str(fast), "--out", str(page)]).exit_code == 0
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="chart-data">(.*?)</script>', text, re.DOTALL)
    charts = json.loads(data)
    assert charts.keys() == {f"{axis}-{number}" for axis in ("step", "images") for number in range(3)}
    assert [max(trace["x"]) for trace in charts["step-0"]["data"]] == [20, 10]
    assert [max(trace["x"]) for trace in charts["images-0"]["data"]] == [160, 160]
    assert len({trace["line"]["color"] for trace in charts["step-0"]["data"]}) == 2
    assert {"slow/", "fast/"} == {link["href"] for link in PageReader(text).all_of("a") if link["href"] != "#main"}


def test_texts_of_users_are_texts(tmp_path: Path) -> None:
    hostile, (slow, _) = write_hostile_run(tmp_path / "h"), two_runs(tmp_path)
    said = CliRunner().invoke(app, ["compare", str(hostile), str(slow), "--out", str(tmp_path / "c.html")])
    assert said.exit_code == 0, said.output
    page = PageReader((tmp_path / "c.html").read_text())
    assert not page.dangers()
    assert SECRET not in (tmp_path / "c.html").read_text() + said.output
    assert all(text in page.text for text in HOSTILE)


def test_a_terminal_is_given_no_escape_sequence(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, summary={"val_\x1b[31mx": 0.5}) for name in ("one", "t\x1b[2Jwo")]
    said = CliRunner().invoke(app, ["compare", *map(str, runs)])
    assert said.exit_code == 0 and "\x1b" not in said.output
    assert "val_?[31mx" in said.output and "t?[2Jwo" in said.output
