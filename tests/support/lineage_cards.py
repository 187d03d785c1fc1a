"""Exports and runs as far as lineage looks at them: cards, records, and weights of a few bytes."""

import hashlib
from pathlib import Path
from typing import Any

from foveal.atomic import write_json
from foveal.runs.card_record import read_card_record
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, inputs_from_dict, write_inputs

DIGITS = DatasetInput("training", "digits", "", "train", "d1" * 32, 1_437, 300, 10)


def write_card(folder: Path, inputs: RunInputs | None = None, *, stage: str = "pretrain", **fields: Any) -> Path:
    """The export of a stage; without inputs it is one of an older version."""
    folder.mkdir(parents=True)
    weights = f"weights of {stage} {folder}".encode()
    (folder / "model.safetensors").write_bytes(weights)
    record = {} if inputs is None else {"inputs": inputs.to_dict()}
    card = {"format": 1, "stage": stage, "step": 7, "metrics": {}, "science": {}, "encoder": {}}
    write_json(folder / "card.json", card | {"sha256": hashlib.sha256(weights).hexdigest()} | record | fields)
    return folder


def use_export(folder: Path, role: str, *, is_recorded: bool = True) -> ModelInput:
    """An export as an input of a run."""
    card = read_card_record(folder)
    inputs = inputs_from_dict(card.stored_inputs, "card") if is_recorded else None
    return ModelInput(role, str(folder), card.sha256, card.stage, card.step, inputs, card.results)


def write_run(
    folder: Path, inputs: RunInputs | None = None, *, config: str = "{}", science: dict[str, Any] | None = None
) -> Path:
    """The directory of a run in which an attempt has begun."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    write_json(folder / "science.json", science or {})
    if inputs is not None:
        write_inputs(folder, inputs)
    return folder
