"""``foveal export`` as a command: what it prints, and one sentence and exit code 2 for what it cannot do."""

import importlib
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_exports import KINDS, written
from typer.testing import CliRunner

from foveal.cli import app, main
from foveal.convert import formats
from foveal.errors import ExportError

RUNNER = CliRunner()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return written(tmp_path / "export", *KINDS["plain"]())


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """Exit code and standard error of the command as a shell starts it."""
    monkeypatch.setattr(sys, "argv", ["foveal", "export", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(str(end.value.code)), capsys.readouterr().err.strip()


def test_it_prints_differences_loading_lines_and_the_folder(export: Path) -> None:
    result = RUNNER.invoke(app, ["export", str(export), "--to", "safetensors"], catch_exceptions=False)
    lines = result.output.splitlines()
    assert lines[0].startswith("opened by safetensors ")
    assert lines[0].endswith(", compared on 4 images:")
    assert lines[1] == "  features: largest difference 0.0e+00, 0.0e+00 of the largest value (limit 2e-05)"
    assert lines[-1] == f"done: {export}-safetensors"
    assert f'  with safe_open("{export}-safetensors/model.safetensors", "pt") as file:' in lines


def test_out_and_images_are_taken(export: Path, tmp_path: Path) -> None:
    words = ["export", str(export), "--to", "safetensors", "--out", str(tmp_path / "there"), "--images", str(tmp_path)]
    result = RUNNER.invoke(app, words)
    assert "has no image that decodes; name a folder with images by --images" in str(result.exception)
    assert not (tmp_path / "there").exists()
    result = RUNNER.invoke(app, words[:-2], catch_exceptions=False)
    assert (tmp_path / "there" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--to", "keras"], "--to keras does not exist; there are timm, hf, onnx, pt2, safetensors"),
        (["--to", "safetensors", "--dtype", "int8"], "--dtype int8 does not exist; there are fp32, bf16, fp16"),
        (["--to", "onnx", "--dtype", "bf16"], "--dtype is for --to safetensors, not for --to onnx"),
        (["--to", "hf", "--patches"], "--patches is for --to onnx and pt2, not for --to hf"),
        (["--to", "timm", "--preprocess"], "--preprocess is for --to onnx and pt2, not for --to timm"),
        (["--to", "pt2", "--images", "nowhere"], "--images nowhere is no folder"),
    ],
)
def test_wrong_options_are_a_sentence_and_code_2(
    words: list[str],
    sentence: str,
    export: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, text = said(capsys, monkeypatch, export, *words)
    assert (code, text.splitlines()) == (2, [text])
    assert sentence in text
    assert [each.name for each in export.parent.iterdir()] == ["export"]


def test_an_unfinished_run_is_a_sentence_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    code, text = said(capsys, monkeypatch, tmp_path / "run", "--to", "hf")
    assert (code, text.splitlines()) == (2, [text])
    assert text.endswith("run is the directory of an unfinished run; start the run again, it goes on to its end")


def test_an_existing_folder_stays_as_it_is(
    export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (there := export.with_name("export-pt2")).mkdir()
    code, text = said(capsys, monkeypatch, export, "--to", "pt2")
    assert (code, list(there.iterdir())) == (2, [])
    assert text.endswith("export-pt2 exists already; name another folder by --out, or remove it")


def test_patches_of_a_classifier_are_refused(tmp_path: Path) -> None:
    export = written(tmp_path / "export", *KINDS["classifier"]())
    result = RUNNER.invoke(app, ["export", str(export), "--to", "pt2", "--patches"])
    assert "--patches is for encoders" in str(result.exception)


@pytest.mark.parametrize(("to", "library"), [("hf", "transformers"), ("onnx", "onnxruntime"), ("onnx", "onnx")])
def test_a_missing_library_is_a_sentence_with_the_command(
    to: str, library: str, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == library:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ExportError, match=rf"needs {library}, which is not installed: pip install 'foveal\[export\]'"):
        formats.convert(export, to)
    assert [each.name for each in export.parent.iterdir()] == ["export"]


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """Let no file grow beyond a few KB, as on a disk that fills (tests/support/full_disk.py); put it back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["hf", "onnx", "pt2", "safetensors"])
def test_a_disk_that_fills_is_a_sentence_and_leaves_nothing(
    to: str, export: Path, full_disk: Callable[[], None]
) -> None:
    full_disk()
    with pytest.raises(ExportError, match=rf"export-{to} cannot be written \(.*; make room, or name another place"):
        formats.convert(export, to)
    assert [each.name for each in export.parent.iterdir()] == ["export"]
