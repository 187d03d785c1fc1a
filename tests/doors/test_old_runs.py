"""Run directories of foveal 0.1.0, continued by their original commands: losses, evaluations and weights are 0.1.0's own.

They lie in tests/fixtures/v0_1_0; its README.md says how they were made.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from points import in_jsonl, in_mlflow
from ranks import Ranks, stage_named
from safetensors.torch import load_file

from foveal import cli
from foveal.config import science
from foveal.distributed.world import World
from foveal.errors import CheckpointError
from foveal.renames import translate_metrics
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.config import StageConfig
from foveal.training.launch import run_stage
from foveal.training.provenance import get_library_versions
from pretrain.config import PretrainConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1_0"
RUNS = sorted(file.parent.name for file in FIXTURES.glob("*/expected.json"))
FINISHED = [name for name in RUNS if (FIXTURES / name / "runs" / name / "finished.json").exists()]
INTERRUPTED = sorted(set(RUNS) - set(FINISHED))


@pytest.fixture(scope="module")
def fresh_rank() -> Iterator[Ranks]:
    """A process without DeepSpeed, whose ZeRO 3 replaces torch's linear function for good, with other rounding."""
    ranks = Ranks(1)
    yield ranks
    ranks.close()


def copy_fixture(name: str, folder: Path) -> dict[str, Any]:
    """Copy a run directory, its config, the data and the exports; what 0.1.0 made of them."""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    for shared in ("data", "exports"):
        shutil.copytree(FIXTURES / shared, folder / shared)
    return json.loads((folder / "expected.json").read_text())


class GrownConfig(PretrainConfig):
    """Pretraining of a later version, with one more science setting, whose default is not what 0.1 did."""

    colour_weight: float = science(0.5, "Weight of a loss that 0.1 did not have.", since="0.2", neutral=0.0)


def start(world: World, folder: str, command: list[str], config_class: type[StageConfig] | None = None) -> None:
    """Start a stage in a folder by the arguments of ``python -m``."""
    module, config, *overrides = command
    stage, before = stage_named(module.removesuffix(".run")), Path.cwd()
    stage = stage if config_class is None else replace(stage, config_class=config_class)
    os.chdir(folder)
    try:
        run_stage(stage, load_config(stage.config_class, stage.name, config, [*overrides, "data.workers=0"]), world)
    finally:
        os.chdir(before)


def rounds_equally(expected: dict[str, Any]) -> bool:
    """Whether the libraries and the processor are those that the fixtures were made with."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in info.read_text().splitlines()] if info.exists() else []
    capability, model = expected["cpu"]
    ours = get_library_versions() | {"foveal": expected["versions"]["foveal"]}
    libraries_equal = expected["versions"].items() <= ours.items()
    return libraries_equal and capability == torch.backends.cpu.get_cpu_capability() and model in models


def check_numbers(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, exactly: bool) -> None:
    """Compare row by row under the names of today; found rows may have further numbers.

    Other processors round otherwise: see test_golden.py.
    """
    expected = [translate_metrics(row) for row in expected]
    assert [row.get("step") for row in found] == [row.get("step") for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.keys() <= ours.keys()
        if exactly:
            assert {name: ours[name] for name in theirs} == theirs
        else:
            losses = {name: value for name, value in theirs.items() if name.endswith("loss") or name == "lr"}
            assert {name: ours[name] for name in losses} == pytest.approx(losses, rel=1e-4)


def check_weights(run: Path, expected: Path) -> None:
    """Compare the exported weights where processors round differently."""
    files = list(expected.rglob("model.safetensors"))
    for file in files:
        ours, theirs = load_file(run / "export" / file.relative_to(expected)), load_file(file)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert (ours[name] - weight).norm() <= 1e-3 * weight.norm() + 1e-3, name


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on(name: str, fresh_rank: Ranks, tmp_path: Path) -> None:
    expected = copy_fixture(name, tmp_path)
    run = tmp_path / expected["run"]
    written, caches = len(read_rows_without_time(run / "metrics.jsonl")), sorted(tmp_path.glob("answers/*"))
    fresh_rank.call(start, str(tmp_path), expected["command"])
    exactly = rounds_equally(expected)
    assert written < len(expected["rows"])
    check_numbers(read_rows_without_time(run / "metrics.jsonl"), expected["rows"], exactly=exactly)
    summary = json.loads((run / "finished.json").read_text())["summary"]
    check_numbers([summary], [expected["summary"]], exactly=exactly)
    for nested, rows in expected["nested_rows"].items():
        check_numbers(read_rows_without_time(run / nested / "metrics.jsonl"), rows, exactly=exactly)
    if exactly:
        assert sorted(tmp_path.glob("answers/*")) == caches, "the teacher's answers are found again"
        digests = {place: hashlib.sha256((run / place).read_bytes()).hexdigest() for place in expected["digests"]}
        assert digests == expected["digests"]
    else:
        check_weights(run, tmp_path / "expected")


def test_a_setting_that_was_added_refuses_no_run_in_flight(fresh_rank: Ranks, tmp_path: Path) -> None:
    expected = copy_fixture("pretrain", tmp_path)
    run, command = tmp_path / expected["run"], expected["command"]
    with pytest.raises(CheckpointError, match="a foveal version without colour_weight"):
        fresh_rank.call(start, str(tmp_path), [*command, "colour_weight=0.5"], GrownConfig)
    fresh_rank.call(start, str(tmp_path), command, GrownConfig)
    rows = read_rows_without_time(run / "metrics.jsonl")
    check_numbers(rows, expected["rows"], exactly=rounds_equally(expected))
    assert json.loads((run / "science.json").read_text())["colour_weight"] == 0.0


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_left_as_it_is(name: str, fresh_rank: Ranks, tmp_path: Path) -> None:
    expected = copy_fixture(name, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    fresh_rank.call(start, str(tmp_path), expected["command"])
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def call_foveal(monkeypatch: pytest.MonkeyPatch, capsys, *words: str) -> str:
    """The output of a ``foveal`` command that succeeds."""
    monkeypatch.setattr(sys, "argv", ["foveal", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert not end.value.code, said.err
    return said.out


def test_attempts_lists_an_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run = copy_fixture("pretrain", tmp_path)["run"]
    monkeypatch.chdir(tmp_path)
    _, row, _, end = call_foveal(monkeypatch, capsys, "attempts", run).splitlines()
    assert "node" in row
    assert "0 to 5" in row
    assert end == "1: asked to leave (SIGTERM): saved at step 5 of 9"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sync_delivers_an_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from mlflow.tracking import MlflowClient

    run = tmp_path / copy_fixture("finetune_detect", tmp_path)["run"]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said = call_foveal(monkeypatch, capsys, "track", "sync", str(run), "--uri", uri)
    assert f"{len(read_rows_without_time(run / 'metrics.jsonl'))} rows" in said
    assert in_mlflow(MlflowClient(uri), run) == in_jsonl(run)
