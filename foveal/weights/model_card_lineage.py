"""The models that an export was made from, in its model card: names and digests, and no paths."""

from foveal.errors import CheckpointError
from foveal.runs.inputs import ModelInput, RunInputs, describe_roles, inputs_from_dict
from foveal.weights.card import Card
from foveal.weights.markdown import code_cell, escape, table

_MOST_MODELS = 30  # in the table
_MOST_NAMES = 3  # of data sets, in a row
_STAGES = {"foreign": "weights of others"}


def lineage_section(card: Card) -> str:
    """Return the table of the models that the export was made from, nearest first; "" if there are none."""
    ancestors = [] if (inputs := _read_inputs(card)) is None else list(inputs.iter_ancestors())
    if not ancestors:
        return ""
    rows = [
        (escape(describe_roles(roles)), *_describe(model), code_cell(model.sha256))
        for model, roles in ancestors[:_MOST_MODELS]
    ]
    rest = len(ancestors) - len(rows)
    more = f"\n{rest} more models are in card.json.\n" if rest else ""
    return f"## Lineage\n\n{table(('Model', 'Stage', 'Step', 'Trained on', 'sha256'), rows)}{more}"


def _describe(model: ModelInput) -> tuple[str, str, str]:
    """Return stage, step and data sets of a model."""
    stage = escape(_STAGES.get(model.stage, model.stage))
    step = "" if model.stage in _STAGES else str(model.step)
    if model.inputs is None:
        return stage, step, "not recorded"
    names = list(dict.fromkeys(data.name for data in model.inputs.datasets if data.role == "training"))
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return stage, step, f"{', '.join(map(escape, names[:_MOST_NAMES]))}{more}"


def _read_inputs(card: Card) -> RunInputs | None:
    try:
        return inputs_from_dict(card.inputs, "card.json")
    except CheckpointError:  # of a later version, perhaps; the model card does without
        return None
