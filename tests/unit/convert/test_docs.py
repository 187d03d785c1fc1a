"""The Python of docs/exports.md runs as it stands, on what the command of that page writes."""

import re
from pathlib import Path

import pytest
from house import ROOT
from PIL import Image
from tiny_exports import CLASSES, KINDS, written

from foveal.convert.formats import FORMATS, convert

for library in ("transformers", "onnxruntime"):
    pytest.importorskip(library, reason="needs the extra foveal[export]")

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "exports.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photograph and with a classifier's export in every format."""
    folder = tmp_path_factory.mktemp("docs")
    export = written(folder / "runs" / "finetune" / "export", *KINDS["classifier"]())
    for to in FORMATS:
        convert(export, to)
    Image.linear_gradient("L").convert("RGB").save(folder / "photo.jpg")
    return folder


def test_every_format_has_a_block() -> None:
    assert [to for to in FORMATS if not any(f"export-{to}" in block for block in BLOCKS)] == []


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:40])
def test_a_block_runs(
    block: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec(compile(block, "docs/exports.md", "exec"), names)  # noqa: S102 - our own page
    printed = capsys.readouterr().out
    if "print" in block:
        assert any(name in printed for name in CLASSES)
    if "classes" in names:
        assert names["classes"] == list(CLASSES)
