"""Recorded inputs: what is written is read, shared ancestors are written once, damage is a sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lineage_cards import DIGITS

from foveal.atomic import encode_json
from foveal.errors import CheckpointError
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, inputs_from_dict, read_inputs, write_inputs


def made_from(number: int, *models: ModelInput, datasets: tuple[DatasetInput, ...] = (DIGITS,)) -> RunInputs:
    return RunInputs(f"/runs/{number}", "pretrain", datasets, models)


def used(role: str, inputs: RunInputs | None, digest: str = "") -> ModelInput:
    run = "" if inputs is None else inputs.run
    return ModelInput(role, f"{run}/export", digest or f"digest of {run}", "pretrain", 3, inputs, {"val_top1": 0.5})


def reread(inputs: RunInputs) -> RunInputs:
    """The inputs as another run reads them in a card: ancestors of two cards are not the same objects."""
    found = inputs_from_dict(json.loads(json.dumps(inputs.to_dict())), "card.json")
    assert found is not None
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first = made_from(1)
    student = made_from(2, used("teacher", first), used("init", None, "of others"))
    inputs = made_from(3, used("init", student), used("teacher", first))
    write_inputs(tmp_path, inputs)
    assert read_inputs(tmp_path) == inputs
    assert read_inputs(tmp_path / "nowhere") is None
    assert inputs_from_dict({}, "an old card") is None


def test_a_shared_ancestor_is_written_once() -> None:
    inputs = made_from(0)
    for number in range(1, 13):  # as a tree 2**12 nodes
        inputs = made_from(number, used("init", reread(inputs)), used("teacher", reread(inputs)))
    record = inputs.to_dict()
    assert [run["run"] for run in record["ancestors"]["runs"]] == [f"/runs/{number}" for number in range(12)]
    assert len(list(inputs.iter_ancestors())) == 24  # each in both roles, with the nearest way to it


def test_ten_stages_of_a_thousand_mixtures_fit_into_a_card() -> None:
    datasets = tuple(replace(DIGITS, name=f"data set {number}", path=f"/data/{number}") for number in range(1_000))
    inputs = made_from(0, datasets=datasets)
    for number in range(1, 10):
        inputs = made_from(number, used("init", reread(inputs)), used("teacher", reread(inputs)), datasets=datasets)
    assert len(encode_json(inputs.to_dict())) < 1e6
    assert reread(inputs) == inputs


def test_forks_of_forks_may_be_many() -> None:
    inputs = made_from(0)
    for number in range(1, 3_000):  # deeper than Python's recursion
        inputs = made_from(number, used("fork", inputs))
    record = inputs.to_dict()
    assert len(record["ancestors"]["runs"]) == 2_999
    assert sum(1 for _ in inputs.iter_ancestors()) == 2_999
    assert inputs_from_dict(record, "card.json") is not None


@pytest.mark.parametrize(
    "change",
    [
        {"run": 3},
        {"datasets": [{"role": "training"}]},
        {"models": [{"role": "init", "path": "", "sha256": "", "stage": "", "step": 0, "inputs": 7}]},
        {"models": [{"role": "init", "path": "", "sha256": "", "stage": "", "step": 0, "inputs": -1}]},
        {"ancestors": {"runs": [{"run": "", "stage": "", "datasets": [0], "models": []}]}},
        {"ancestors": [1]},
    ],
)
def test_damage_is_a_sentence(change: dict[str, Any]) -> None:
    record = made_from(1).to_dict() | change
    with pytest.raises(CheckpointError, match=r"^card.json: its inputs are not as foveal wrote them \("):
        inputs_from_dict(record, "card.json")


def test_a_row_refers_to_earlier_rows_only() -> None:
    record = made_from(2, used("init", made_from(1))).to_dict()
    (row,) = record["ancestors"]["runs"]
    row["models"] = [record["models"][0]]  # a run that was made from itself
    with pytest.raises(CheckpointError, match="refer to a row that is not there"):
        inputs_from_dict(record, "card.json")


def test_a_later_version_may_record_more() -> None:
    record = made_from(1, used("init", None)).to_dict()
    record["models"][0]["license"] = record["license"] = "mit"
    assert reread(made_from(1, used("init", None))) == inputs_from_dict(record, "card.json")
