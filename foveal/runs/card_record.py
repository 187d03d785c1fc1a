"""What ``card.json`` of an export says, read without torch, and of later versions as far as their cards agree."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.errors import ExportError
from foveal.renames import translate_setting
from foveal.runs.inputs import RunInputs, inputs_from_dict
from foveal.weights.card import EXPORT_FORMAT, brief_results

CARD = "card.json"
_FIELDS = {"stage": str, "step": int, "sha256": str, "metrics": dict, "science": dict, "inputs": dict}
_NEEDED = ("stage", "sha256")


@dataclass(frozen=True)
class CardRecord:
    """An export by its card. science: settings and inherited facts, under the names of today."""

    folder: Path
    stage: str
    step: int
    sha256: str
    results: Mapping[str, float]
    science: Mapping[str, Any]
    stored_inputs: Mapping[str, Any]

    def read_inputs(self) -> RunInputs | None:
        """Return the recorded inputs; None in a card of an older version. Raises: CheckpointError for a damaged record."""
        return inputs_from_dict(self.stored_inputs, str(self.folder / CARD))


def read_card_record(folder: Path) -> CardRecord:
    """Read the card of an export. Raises: ExportError for a missing or damaged card, or one of another format."""
    file = folder / CARD
    try:
        fields = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"there is no {CARD} in {folder}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read ({error})") from None
    if not isinstance(fields, dict) or fields.get("format") != EXPORT_FORMAT:
        export_format = fields.get("format") if isinstance(fields, dict) else None
        raise ExportError(f"{folder} has export format {export_format}; this foveal reads format {EXPORT_FORMAT}")
    for name, kind in _FIELDS.items():
        if (name in _NEEDED and name not in fields) or not isinstance(fields.get(name, kind()), kind):
            raise ExportError(f"{file} is not as foveal wrote it ({name!r}): export it again")
    values = {name: fields.get(name, kind()) for name, kind in _FIELDS.items()}
    science = dict(translate_setting(name, value) for name, value in values.pop("science").items())
    results, inputs = brief_results(values.pop("metrics")), values.pop("inputs")
    return CardRecord(folder, results=results, science=science, stored_inputs=inputs, **values)


def iter_science_models(science: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (role, digest) of the models that the science of an older version names."""
    for name, value in science.items():
        role = name.removeprefix("inherited.")
        is_model = role in ("init", "teacher", "fork") or role.startswith("arm.")
        if role != name and is_model and isinstance(value, str) and value != "scratch":
            yield role, value
