"""What other libraries get holds no path of the machines that trained the model."""

from pathlib import Path

import pytest
from lineage_cards import DIGITS
from tiny_exports import KINDS, written

from foveal.atomic import read_json, write_json
from foveal.convert.formats import convert
from foveal.runs.inputs import ModelInput, RunInputs

PLACE = "/disk/of/ann"


@pytest.mark.parametrize("to", ["timm", "hf", "safetensors"])
def test_no_path_of_a_card_is_in_another_format(to: str, tmp_path: Path) -> None:
    export = written(tmp_path / "export", *KINDS["classifier"]())
    teacher = ModelInput("teacher", f"{PLACE}/teacher/export", "a" * 64, "pretrain", 1)
    inputs = RunInputs(f"{PLACE}/run", "finetune", (DIGITS,), (teacher,)).to_dict()
    write_json(export / "card.json", read_json(export / "card.json") | {"inputs": inputs})
    folder = convert(export, to).folder
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert PLACE.encode() not in file.read_bytes(), file
        assert file.name != "card.json"
