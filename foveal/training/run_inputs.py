"""The inputs of a planned run, and its plan, as its directory records them."""

from collections.abc import Iterator
from pathlib import Path

from foveal.data.dataset import Dataset
from foveal.data.sampling.subset import eval_split, select_subset
from foveal.errors import CheckpointError, ExportError
from foveal.redact import redact
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, inputs_from_dict, read_inputs
from foveal.runs.record import PlannedRun
from foveal.training.lineage import Fork
from foveal.training.plan import Plan
from foveal.weights.foreign_card import FOREIGN_STAGE
from foveal.weights.pretrained import SourceModel


def collect_inputs(stage_name: str, run_dir: Path, plan: Plan) -> RunInputs:
    """Return the inputs of a run, as ``inputs.json`` and the cards of its exports record them."""
    models = [_model_input(role, model) for role, model in plan.source_models.items()]
    models += [] if plan.fork is None else [_fork_input(stage_name, plan.fork)]
    return RunInputs(str(run_dir.resolve()), stage_name, tuple(_dataset_inputs(plan)), tuple(models))


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
    data = plan.cfg.data
    sources = zip(plan.training_set.sources, plan.training_set.order.source_sizes, strict=True)
    for source, num_used in sources:
        yield _dataset_input("training", source.dataset, source.split, num_used)
    evaluated = eval_split(data)
    if evaluated.split in plan.dataset.manifest.splits and (evaluated.subset != "fold" or data.fold is not None):
        subset = select_subset(plan.dataset, data, split=evaluated.split, subset=evaluated.subset, seed=plan.cfg.seed)
        yield _dataset_input("evaluation", plan.dataset, evaluated.split, len(subset))


def _dataset_input(role: str, dataset: Dataset, split: str, num_used: int) -> DatasetInput:
    return DatasetInput(
        role,  # type: ignore[arg-type]
        dataset.manifest.name,
        redact(dataset.folder),
        split,
        dataset.samples_digest(split),
        dataset.num_samples(split),
        num_used,
        len(dataset.classes or ()),
    )


def _model_input(role: str, model: SourceModel) -> ModelInput:
    path, card = str(model.path.expanduser().resolve()), model.card
    if card is None:
        return ModelInput(role, path, model.sha256, FOREIGN_STAGE, 0)
    try:
        inputs = inputs_from_dict(card.inputs, f"{path}/card.json")
    except CheckpointError as error:
        raise ExportError(str(error)) from None
    return ModelInput(role, path, model.sha256, card.stage, card.step, inputs)


def _fork_input(stage_name: str, fork: Fork) -> ModelInput:
    """Return the source of a fork; a source that is gone by now has no inputs."""
    return ModelInput("fork", fork.run, fork.digest, stage_name, fork.step, read_inputs(Path(fork.run)))
