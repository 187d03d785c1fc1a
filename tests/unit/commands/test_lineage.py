"""``foveal lineage``: the tree at 80 columns, JSON, exit codes, and text that nobody has checked."""

import json
from pathlib import Path

import pytest
from lineage_cards import DIGITS, use_export, write_card, write_run
from rich.cells import cell_len
from typer.testing import CliRunner, Result

from foveal.cli import app
from foveal.errors import ConfigError, ExportError
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs

USER = "user:password"
HOSTILE = '[red]<script>alert("ü")</script>\x1b[2J\r\n\u202eevil[/red]'


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["lineage", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A classifier of an encoder."""
    encoder = write_card(tmp_path / "encoder" / "export", RunInputs("/runs/encoder", "pretrain", (DIGITS,)))
    inputs = RunInputs("/runs/classifier", "finetune", (DIGITS,), (use_export(encoder, "init"),))
    run = write_run(tmp_path / "classifier", inputs)
    return write_card(run / "export", inputs, stage="finetune", metrics={"val_top1": 0.5})


def test_the_model_is_on_top(export: Path) -> None:
    lines = call(export).output.splitlines()
    assert lines[0].startswith("finetune classifier, step 7, ")
    assert lines[1] == "val_top1 0.5"
    assert "├── trained on: digits, train, 1,437 images (300 used), d1d1d1d1d1d1" in lines
    assert any(line.startswith("└── init: pretrain encoder, step 7, ") for line in lines)


def test_json_has_the_documented_keys(export: Path) -> None:
    tree = json.loads(call(export, "--json", "--check").output)
    documented = (Path(__file__).parents[3] / "docs" / "lineage.md").read_text()
    (model,), (dataset, *_), checks = tree["models"], tree["datasets"], tree.pop("checks")
    for names in (tree, model, dataset, checks[0]):
        assert not [name for name in names if f"`{name}`" not in documented]
    assert [check["verdict"] for check in checks] == ["agrees", "not checked", "agrees"]


def test_a_file_that_was_changed_is_an_error(export: Path) -> None:
    (export.parents[1] / "encoder" / "export" / "model.safetensors").write_bytes(b"others")
    result = call(export, "--check")
    assert "differs" in result.output
    assert isinstance(result.exception, ExportError)
    assert (str(result.exception), result.exception.exit_code) == (
        "digests that differ from what is recorded: 1 of 3, as said above",
        2,
    )
    (export.parents[1] / "encoder" / "export" / "model.safetensors").unlink()
    assert call(export, "--check").exit_code == 0


def test_descendants(export: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder" / "export"
    lines = call(encoder, "--descendants", tmp_path).output.splitlines()
    assert lines[0] == "classifier/export"
    assert lines[1].startswith("  finetune, step 7, ")
    assert lines[1].endswith("; the model is its init")
    found = json.loads(call(encoder, "--descendants", tmp_path, "--json").output)
    assert [(item["path"], item["roles"]) for item in found["descendants"]] == [(str(export), ["init"])]
    assert call(export, "--descendants", tmp_path).output.endswith(" was made from it\n")
    assert isinstance(call(encoder, "--descendants", tmp_path / "nowhere").exception, ConfigError)
    assert isinstance(call(encoder, "--descendants", tmp_path, "--check").exception, ConfigError)


def test_text_of_users_is_shown_as_it_is(tmp_path: Path) -> None:
    hostile = DatasetInput("training", HOSTILE, f"/{HOSTILE}", HOSTILE, HOSTILE, 3, 2)
    source = ModelInput(HOSTILE, f"/{HOSTILE}", HOSTILE, HOSTILE, 1, None, {HOSTILE: 0.5})
    gone = ModelInput("init", f"/{HOSTILE}", HOSTILE, "", 1)
    folder = tmp_path / HOSTILE.replace("/", "")
    inputs = RunInputs(f"/{HOSTILE}", HOSTILE, (hostile,), (source, gone))
    export = write_card(write_run(folder, inputs) / "export", inputs, stage=HOSTILE, metrics={f"val_{HOSTILE}": 1.0})
    for arguments in ((export,), (export, "--check"), (export, "--descendants", tmp_path)):
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        assert all(character.isprintable() for character in result.output.replace("\n", ""))
        if len(arguments) == 1:
            shown = "".join(line.strip("│├└─ ") for line in result.output.splitlines())
            assert shown.count("[red]<script>") > 10
            assert "![red]" not in shown
            assert all(cell_len(line) <= 80 for line in result.output.splitlines())
    assert json.loads(call(export, "--json").output)["datasets"][0]["name"] == HOSTILE


def test_secrets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "hunter2hunter2")
    data = DatasetInput("training", "d", f"s3://{USER}@bucket/hunter2hunter2", "train", "d", 3, 2)
    export = write_card(tmp_path / "export", RunInputs("/run", "pretrain", (data,)))
    for arguments in ((export,), (export, "--check"), (export, "--json")):
        output = call(*arguments).output
        assert "s3://bucket/***" in output
        assert "hunter2" not in output
        assert "password" not in output
