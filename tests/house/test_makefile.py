"""What make says on a machine that lacks something, and what it leaves alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and what its rules look at."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=outside, capture_output=True, text=True, check=False)


def script(file: Path, text: str) -> Path:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_an_old_python_is_one_sentence(checkout: Path) -> None:
    old = script(checkout / "old", "exit 1")
    said = make(checkout, "demo", f"PYTHON={old}")
    assert said.returncode == 2
    assert f"make: foveal needs Python 3.11 or newer, and none of {old} is" in said.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_without_venv_is_one_sentence(checkout: Path) -> None:
    bare = script(checkout / "bare", f'case "$2" in *ensurepip*) exit 1 ;; esac\nexec {sys.executable} "$@"')
    said = make(checkout, "demo", f"PYTHON={bare}")
    assert said.returncode == 2
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert f"make: {bare} cannot make a virtual environment" in said.stderr
    assert f"apt-get install {package}" in said.stderr
    assert not (checkout / ".venv" / ".made").exists()


def test_a_failed_install_is_tried_again(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "python", "echo no network >&2; exit 1")
    (checkout / ".venv" / ".made").touch()
    for _ in range(2):
        said = make(checkout, ".venv/.installed-test")
        assert said.returncode == 2
        assert "no network" in said.stderr
    assert not list((checkout / ".venv").glob(".installed*"))


def test_an_install_is_one_call_of_pip(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "python", 'echo "$@" >> calls')
    (checkout / ".venv" / ".made").touch()
    for _ in range(2):
        assert make(checkout, ".venv/.installed-test", ".venv/.installed").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("-m pip install ")
    assert calls[0].endswith("-c constraints.txt -e .[s3,test]")


def test_another_interpreter_is_not_overheard(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    script(checkout / ".venv" / "bin" / "python", "echo Python 3.11.2")
    (checkout / ".venv" / ".made").touch()
    said = make(checkout, ".venv/.made", f"PYTHON={script(checkout / 'other', 'echo Python 3.12.1')}")
    assert said.returncode == 2
    assert "run make clean first" in said.stderr


def test_clean_keeps_the_runs_of_others(checkout: Path) -> None:
    for folder in (".venv/bin", "data/digits", "data/mine", "runs/demo/pretrain", "runs/mine"):
        (checkout / folder).mkdir(parents=True)
    (checkout / "runs" / "mlflow.db").touch()
    assert "runs/mine" in make(checkout, "clean").stdout
    left = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_dir() or path.suffix == ".db"}
    assert left == {"data", "data/mine", "runs", "runs/mine", "runs/mlflow.db"}
    shutil.rmtree(checkout / "runs" / "mine")
    assert make(checkout, "clean").returncode == 0
    assert not (checkout / "runs").exists()


def test_help_lists_every_target(checkout: Path) -> None:
    said = make(checkout).stdout
    for target in ("demo", "test", "test-rest", "test-all", "test-durations", "gpu", "ui", "check", "docs", "clean"):
        assert f"make {target} " in said
