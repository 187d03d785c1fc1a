"""Checks of the labels that a run learns from, before it starts: classes that occur, and what labels in members hold."""

import numpy as np

from finetune.config import FinetuneConfig
from finetune.task import Task
from foveal.data.image.targets import LabelReader, list_names
from foveal.data.label_survey import SplitSurvey, survey_split
from foveal.data.sampling.sources import SampleSource, TrainingSet
from foveal.data.sampling.subset import eval_split, select_subset
from foveal.errors import ConfigError, DataError, StorageUnreachableError


def check_labels(
    cfg: FinetuneConfig, task: Task, training_set: TrainingSet, reader: LabelReader | None, classes: tuple[str, ...]
) -> tuple[str, ...]:
    """Return lines for the printed plan about the labels of the training and the evaluation data.

    Raises: DataError if the classes or the labels of the training data cannot be learned from. What is wrong with
    labels of the evaluation data is a line: the weights are worth having without it.
    """
    folder = training_set.sources[0].dataset.folder
    if task.min_classes > len(classes) and task.predicts_classes:
        raise DataError(
            f"{folder}: there is one class, {list_names(classes)}, and task={task.name} tells classes apart: give two "
            f"or more (a folder for each class, or the names in `foveal data index --classes`)"
        )
    if task.has_index_labels:
        return _check_index_labels(cfg, training_set, classes)
    if reader is None:
        return ()
    lines = []
    for source in training_set.sources:
        survey = survey_split(reader, source, cfg.data.stall_timeout_seconds)
        if sentence := survey.first_sentence("fault", "untrainable"):
            raise DataError(
                f"{source.dataset.folder}: split '{source.split}': {sentence} (`foveal data verify "
                f"{source.dataset.folder} --full --task {task.name}` reads all)"
            )
        lines += _format_lines(source, survey)
    return (*lines, *_survey_evaluation_data(cfg, reader, training_set))


def _survey_evaluation_data(cfg: FinetuneConfig, reader: LabelReader, training_set: TrainingSet) -> list[str]:
    """Return the lines about the labels that the run is evaluated on, with any fault of theirs."""
    source = _evaluation_source(cfg, training_set)
    if source is None:
        return []
    try:
        return _format_lines(source, survey_split(reader, source, cfg.data.stall_timeout_seconds))
    except StorageUnreachableError:
        raise
    except DataError as error:
        return [f"labels    split '{source.split}' cannot be evaluated on: {error}"]


def _evaluation_source(cfg: FinetuneConfig, training_set: TrainingSet) -> SampleSource | None:
    """Return the samples that the run is evaluated on; None if there are none, of which evaluation speaks."""
    dataset, split = training_set.sources[0].dataset, eval_split(cfg.data)
    try:
        subset = select_subset(dataset, cfg.data, split=split.split, subset=split.subset, seed=cfg.seed)
    except (ConfigError, DataError):
        return None
    return SampleSource(dataset, split.split, subset)


def _check_index_labels(cfg: FinetuneConfig, training_set: TrainingSet, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return lines about classes without a sample. Raises: DataError if one class at most has samples to train on."""
    counts = sum(
        (_count_classes(source, len(classes)) for source in training_set.sources), start=np.zeros(len(classes), int)
    )
    source = training_set.sources[0]
    place = f"split '{source.split}'" + (" and data.mix" if len(training_set.sources) > 1 else "")
    if (counts > 0).sum() < 2:
        raise DataError(
            f"{source.dataset.folder}: all labelled images of {place} are of class "
            f"{list_names(classes[number] for number in np.flatnonzero(counts))}, and task={cfg.task} tells classes "
            f"apart: train on a split with two or more of the {len(classes)} classes"
        )
    lines = [_format_missing(counts, classes, f"{place}, to train on")]
    evaluated = _evaluation_source(cfg, training_set)
    if evaluated is not None:
        counts = _count_classes(evaluated, len(classes))
        lines.append(_format_missing(counts, classes, f"split '{evaluated.split}', to evaluate on"))
    return tuple(line for line in lines if line)


def _count_classes(source: SampleSource, num_classes: int) -> np.ndarray:
    """Return the samples of a source per class, int64 [K]; none for a data set without classes."""
    if source.dataset.classes is None:
        return np.zeros(num_classes, int)
    labels = source.dataset.labels(source.split)
    if source.subset.split_positions is not None:
        labels = labels[source.subset.split_positions]
    return np.bincount(labels[labels >= 0], minlength=num_classes)[:num_classes]


def _format_missing(counts: np.ndarray, classes: tuple[str, ...], place: str) -> str:
    missing = np.flatnonzero(counts == 0)
    names = list_names(classes[number] for number in missing)
    return f"labels    {len(missing)} of {len(classes)} classes have no image in {place}: {names}" if names else ""


def _format_lines(source: SampleSource, survey: SplitSurvey) -> list[str]:
    name = f"{source.dataset.folder}, split '{source.split}'" if source.first_id else f"split '{source.split}'"
    lines = [f"labels    {name}: {survey.summary}"]
    return lines + [f"labels    {name}: {finding.sentence}" for finding in survey.findings]
