"""An installed foveal has the configs and the templates of pages that a checkout has."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import ROOT


@pytest.mark.thorough
def test_the_wheel_has_every_config_and_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("configs", "foveal", "pretrain", "distill", "finetune"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if name.endswith(".yaml")}
    assets = {str(file.relative_to(ROOT)) for file in (ROOT / "foveal" / "report" / "assets").iterdir()}
    assert assets and assets <= names
    assert packed == {f"foveal/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.yaml")}
