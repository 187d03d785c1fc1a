"""All that a page says of one run, as plain data for the template."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from foveal.errors import CheckpointError
from foveal.redact import redact
from foveal.report.charts import Chart
from foveal.report.curves import Curves, read_curves
from foveal.report.events import read_events
from foveal.report.lineage import LineageItem, describe_lineage, shorten_path
from foveal.report.nested import NestedRuns, read_nested
from foveal.report.pictures import PictureBudget, PictureStrip, collect_strips
from foveal.report.results import Evaluation, Result, choose_tiles, read_evaluation
from foveal.report.run_charts import draw_throughput, draw_training, summarize_stragglers
from foveal.report.settings import Settings, read_settings
from foveal.report.summary import Summary, describe_attempts, read_inputs_or_problem, summarize
from foveal.runs.inputs import DatasetInput
from foveal.runs.lineage import lineage_of_record
from foveal.runs.record import RunRecord

_STAGE_TITLES = {"pretrain": "Pretraining", "distill": "Distillation", "finetune": "Fine-tuning"}
_DATA_PICTURES, _CONFUSION_PICTURES = "data-", "confusion-"  # prefixes of file names
_MAX_LINKS = 12  # of a kind


@dataclass(frozen=True)
class Link:
    """A link of a page. href: relative, or "" for a text that leads nowhere."""

    text: str
    href: str
    about: str


@dataclass(frozen=True)
class RunSection:
    """A run on a page. anchor: a prefix of ids that no other run of the page has. problems: what cannot be read."""

    anchor: str
    summary: Summary
    tiles: tuple[Result, ...]
    sentence: str
    incidents: str
    notes: tuple[str, ...]
    plan_lines: tuple[str, ...]
    settings: Settings
    datasets: tuple[DatasetInput, ...]
    data_pictures: tuple[PictureStrip, ...]
    training: tuple[Chart, ...]
    throughput: tuple[Chart, ...]
    stragglers: tuple[tuple[str, ...], ...]
    pictures: tuple[PictureStrip, ...]
    evaluation: Evaluation | None
    nested: NestedRuns | None
    attempts: tuple[tuple[str, ...], ...]
    fork: tuple[str, ...]
    lineage: tuple[LineageItem, ...]
    links: tuple[Link, ...]
    problems: tuple[str, ...] = field(default_factory=tuple)

    @property
    def has_more_results(self) -> bool:
        """Whether there are results that the headline does not show."""
        return len(self.summary.results) > len(self.tiles) or bool(self.evaluation or self.notes)

    @property
    def has_spread(self) -> bool:
        """Whether a result has a spread over seeds or folds."""
        return any(result.spread for result in self.summary.results)

    @property
    def stage_title(self) -> str:
        """The stage as a noun."""
        return _STAGE_TITLES.get(self.summary.stage, "Run")

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts of the run."""
        evaluation = self.evaluation.confusion if self.evaluation is not None else None
        nested = self.nested.chart if self.nested is not None else None
        return tuple(chart for chart in (*self.training, *self.throughput, evaluation, nested) if chart is not None)


def describe_run(
    record: RunRecord, anchor: str, page: Path, budget: PictureBudget, curves: Curves | None = None
) -> RunSection:
    """Return what a page says of a run; what cannot be read is a sentence of ``problems``.

    page: the file that is written, from which links lead. curves: those of the run, if they are read already. Raises: CheckpointError if the run cannot be read at all.
    """
    curves = read_curves(record) if curves is None else curves
    events, problems = read_events(record), list[str]()
    record = replace(record, finished=_check_finished(record.finished, problems))
    problems += [curves.problem] if curves.problem else []
    inputs, problem = read_inputs_or_problem(record)
    problems += [problem] if problem else []
    evaluation = None
    try:
        evaluation = read_evaluation(record)
    except CheckpointError as error:
        problems.append(str(error))
    fork: tuple[str, ...] = ()
    try:
        fork = tuple(record.fork.summary_lines()) if record.fork is not None else ()
    except (CheckpointError, ValueError) as error:
        problems.append(str(error))
    summary = summarize(record, curves)
    is_data = [file for file in record.pictures if file.name.startswith(_DATA_PICTURES)]
    is_drawn = evaluation is not None and evaluation.confusion is not None
    others = [
        file
        for file in record.pictures
        if file not in is_data and not (is_drawn and file.name.startswith(_CONFUSION_PICTURES))
    ]
    notes = record.finished.get("notes") or ()
    return RunSection(
        anchor,
        summary,
        choose_tiles(summary.results),
        summary.sentence(),
        events.sentence(),
        tuple(redact(str(note)) for note in notes),
        tuple(redact(line) for line in (record.plan.lines if record.plan is not None else ())),
        read_settings(record.settings, summary.stage),
        inputs.datasets if inputs is not None else (),
        collect_strips(is_data, budget),
        tuple(draw_training(curves, events)),
        tuple(draw_throughput(record, curves, events)),
        summarize_stragglers(record),
        collect_strips(others, budget),
        evaluation,
        read_nested(record),
        describe_attempts(record),
        tuple(redact(line) for line in fork),
        describe_lineage(lineage_of_record(inputs), page) if inputs is not None else (),
        tuple(_collect_links(record, page)),
        tuple(redact(problem) for problem in problems),
    )


def link_to(target: Path, page: Path) -> str:
    """Return the address of a file or folder from a page, relative and quoted."""
    return quote(os.path.relpath(target.resolve(), page.resolve().parent)) + ("/" if target.is_dir() else "")


def _check_finished(finished: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return what finished.json says, without values of a wrong type, which a hand may have written."""
    kinds = {"notes": list, "seconds": int | float, "total_seconds": int | float}
    wrong = [name for name, kind in kinds.items() if name in finished and not isinstance(finished[name], kind)]
    if wrong:
        problems.append(f"finished.json is damaged: {', '.join(wrong)}")
    return {name: value for name, value in finished.items() if name not in wrong}


def _collect_links(record: RunRecord, page: Path) -> Iterable[Link]:
    run = record.path
    for export in record.exports[:_MAX_LINKS]:
        yield Link(shorten_path(str(export.resolve()), page), link_to(export, page), "export")
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if checkpoints:
        newest = checkpoints[-1]
        yield Link(shorten_path(str(newest.resolve()), page), link_to(newest, page), "newest checkpoint")
    places = [("logs", "logs"), ("metrics.jsonl", "all metrics"), ("config.yaml", "settings"), ("profile", "trace")]
    places += [("refused.jsonl", "refused updates"), ("quarantine.jsonl", "images that did not decode")]
    for name, about in places:
        if (run / name).exists():
            yield Link(shorten_path(str((run / name).resolve()), page), link_to(run / name, page), about)
    uri = record.settings.get("tracking.uri")
    if isinstance(uri, str) and uri:
        plain = redact(uri)
        yield Link(plain, plain if plain.startswith(("http:", "https:")) else "", "MLflow")
