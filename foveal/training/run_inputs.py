"""The inputs of a planned run, and its plan, as its directory records them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from foveal.data.dataset import Dataset
from foveal.data.sampling.subset import select_subset
from foveal.errors import FovealError
from foveal.redact import redact
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, inputs_from_dict, read_inputs
from foveal.runs.record import PlannedRun
from foveal.timeouts import read_with_timeout
from foveal.training.lineage import Fork
from foveal.training.plan import Plan
from foveal.weights.card import brief_results
from foveal.weights.foreign_card import FOREIGN_STAGE
from foveal.weights.pretrained import SourceModel

_SOURCE_TIMEOUT = 60.0  # seconds for a fork's source, whose record is of use and not needed
_log = logging.getLogger(__name__)


def collect_inputs(stage_name: str, run_dir: Path, plan: Plan) -> RunInputs:
    """Return the inputs of a run, as ``inputs.json`` and the cards of its exports record them.

    What cannot be read of an ancestor is a warning, and recorded as not recorded: no training ends for it.
    """
    models = [_model_input(role, model) for role, model in plan.source_models.items()]
    models += [] if plan.fork is None else [_fork_input(stage_name, run_dir, plan.fork)]
    return RunInputs(redact(str(run_dir.resolve())), stage_name, tuple(_dataset_inputs(plan)), tuple(models))


def describe_plan(stage_name: str, plan: Plan) -> PlannedRun:
    """Return what ``plan.json`` records of a plan."""
    return PlannedRun(
        stage_name,
        plan.total_steps,
        plan.stop_step,
        plan.steps_per_epoch,
        plan.world_size,
        plan.num_runs,
        tuple(redact(line) for line in plan.summary_lines()),
    )


def _dataset_inputs(plan: Plan) -> Iterator[DatasetInput]:
    data, manifest = plan.cfg.data, plan.dataset.manifest
    order = plan.training_set.order
    used = (order.first_source_size, *order.epoch_quotas[1:])  # an epoch is a pass over the first
    for source, num_used in zip(plan.training_set.sources, used, strict=True):
        yield _dataset_input("training", source.dataset, source.split, num_used)
    evaluated = plan.evaluated
    if evaluated is not None and evaluated.split in manifest.splits and manifest.splits[evaluated.split].samples:
        subset = select_subset(plan.dataset, data, split=evaluated.split, subset=evaluated.subset, seed=plan.cfg.seed)
        yield _dataset_input("evaluation", plan.dataset, evaluated.split, len(subset))


def _dataset_input(role: str, dataset: Dataset, split: str, num_used: int) -> DatasetInput:
    return DatasetInput(
        role,  # type: ignore[arg-type]
        dataset.manifest.name,
        redact(dataset.folder if dataset.is_remote else str(Path(dataset.folder).resolve())),
        split,
        dataset.samples_digest(split),
        dataset.num_samples(split),
        num_used,
        len(dataset.classes or ()),
    )


def _model_input(role: str, model: SourceModel) -> ModelInput:
    path, card = redact(str(model.path.expanduser().resolve())), model.card
    if card is None:
        return ModelInput(role, path, model.sha256, FOREIGN_STAGE, 0)
    inputs = _or_none(lambda: inputs_from_dict(card.inputs, f"{path}/card.json"))
    return ModelInput(role, path, model.sha256, card.stage, card.step, inputs, brief_results(card.metrics))


def _fork_input(stage_name: str, run_dir: Path, fork: Fork) -> ModelInput:
    """Return the source of a fork, which is read at the fork's first start: afterwards a fork never looks at it."""
    own = _or_none(lambda: read_inputs(run_dir))
    for model in () if own is None else own.models:
        if model.role == "fork" and model.sha256 == fork.digest:
            return model
    source = Path(fork.run)
    inputs = _or_none(lambda: read_with_timeout(source, _SOURCE_TIMEOUT, lambda: read_inputs(source)))
    return ModelInput("fork", redact(fork.run), fork.digest, stage_name, fork.step, inputs)


def _or_none(read: Callable[[], RunInputs | None]) -> RunInputs | None:
    """Return the recorded inputs of a model or run; None, after a warning, if they cannot be read."""
    try:
        return read()
    except (FovealError, OSError) as error:
        _log.warning("the lineage has a gap here: %s", error)
        return None
