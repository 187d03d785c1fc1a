"""The report of a run or of a pipeline: which runs it has, and its page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveal.errors import CheckpointError
from foveal.redact import redact
from foveal.report.charts import Chart
from foveal.report.curves import Curves, read_curves
from foveal.report.page import render_page, write_page
from foveal.report.pictures import PictureBudget
from foveal.report.section import RunSection, describe_run, link_to
from foveal.report.text import format_duration
from foveal.runs.record import NESTED_FOLDERS, RunRecord, is_run, list_runs, name_path, read_run

REPORT_FILE = "report.html"
_PICTURE_BYTES = 1_900_000  # of a run, before base64 makes a third more of them
_PIPELINE_PICTURE_BYTES = 4_500_000
_MAX_METRICS_BYTES_AT_END = 500_000_000  # a minute or more
_MAX_RUNS = 30
_MAX_NEIGHBOURS = 200  # folders beside a pipeline that may hold a stage of it


@dataclass(frozen=True)
class ChainLink:
    """A stage in the chain of a pipeline. inputs: names of the stages whose exports it was made from."""

    section: RunSection
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Stages:
    """The runs of a pipeline by their starts. problems: sentences on those that cannot be read."""

    records: tuple[RunRecord, ...]
    problems: tuple[str, ...] = ()


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the report of a run or pipeline, by default into its folder, and return the file.

    Raises: CheckpointError for a folder without runs, or a place that cannot be written.
    """
    if is_run(path):
        file = out or path / REPORT_FILE
        page = render_run(read_run(path), file)
    else:
        stages = find_stages(path)
        file = out or path / REPORT_FILE
        page = render_pipeline(path, stages, file)
    write_page(file, page)
    return file


def write_report_at_end(run_dir: Path) -> tuple[Path, Curves]:
    """Write the report of a run that has finished; return the file and the curves, which its pipeline's page has too.

    Raises: CheckpointError, also if it would take minutes, for which other ranks do not wait.
    """
    record, file = read_run(run_dir), run_dir / REPORT_FILE
    _check_length_of_metrics([record.path])
    curves = read_curves(record)
    write_page(file, render_run(record, file, curves))
    return file, curves


def write_report_of_pipeline(folder: Path, run_dir: Path, curves: Curves | None = None) -> Path:
    """Write the report of the pipeline of a run that has finished, wherever its directory is, and return the file.

    curves: those of the run, if they are read already. Raises: CheckpointError, also if it would take minutes, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, stages = folder / REPORT_FILE, find_stages(folder, run_dir)
    known = {} if curves is None else {run_dir.resolve(): curves}
    _check_length_of_metrics([each.path for each in stages.records if each.path.resolve() not in known])
    write_page(file, render_pipeline(folder, stages, file, known))
    return file


def _check_length_of_metrics(runs: Sequence[Path]) -> None:
    files = [run / "metrics.jsonl" for run in runs]
    size = sum(file.stat().st_size for file in files if file.exists())
    if size > _MAX_METRICS_BYTES_AT_END:
        raise CheckpointError(f"{size / 1e6:,.0f} MB of metrics.jsonl would be read while the job waits")


def find_stages(folder: Path, known: Path | None = None) -> Stages:
    """Return the runs of a pipeline: those in its folder, those beside it whose ``run.pipeline`` names it, and a known one.

    Raises: CheckpointError if none can be read, or if there are more than a page can have.
    """
    listed = list_runs(folder) if folder.is_dir() else []
    # Folds of a Slurm array exist before the run that they belong to; they are no stages.
    runs = [run for run in listed if run.parent.name not in NESTED_FOLDERS] or listed
    found = {run.resolve(): run for run in runs}
    for run in [*_find_neighbours(folder), *([] if known is None else [known])]:
        found.setdefault(run.resolve(), run)
    runs = list(found.values())
    if not runs:
        read_run(folder)  # raises, and says what the folder is
    if len(runs) > _MAX_RUNS:
        raise CheckpointError(
            f"{folder} holds {len(runs)} runs, and a page has at most {_MAX_RUNS}: give a run, or a pipeline's folder"
        )
    records: list[RunRecord] = []
    problems: list[str] = []
    for run in runs:
        try:
            records.append(read_run(run))
        except CheckpointError as error:
            problems.append(name_path(run, error))
    if not records:
        raise CheckpointError("; ".join(problems))
    records.sort(key=lambda record: record.attempts[0].started_at if record.attempts else 0.0)
    return Stages(tuple(records), tuple(problems))


def render_run(record: RunRecord, file: Path, curves: Curves | None = None) -> str:
    """Return the page of a run. file: where it is going to be. curves: those of the run, if they are read already."""
    section = describe_run(record, "run", file, PictureBudget(_PICTURE_BYTES), curves)
    pipeline = _find_pipeline_page(record)
    facts = {"section": section, "pipeline_href": link_to(pipeline, file) if pipeline is not None else ""}
    return render_page("run.html.j2", f"{record.name} · {section.summary.stage or 'run'}", chart_ids([section]), facts)


def render_pipeline(folder: Path, stages: Stages, file: Path, curves: Mapping[Path, Curves] | None = None) -> str:
    """Return the page of a pipeline: the chain, then each stage. curves: those that are read already, by resolved path."""
    budget, records = PictureBudget(_PIPELINE_PICTURE_BYTES), stages.records
    sections = [
        describe_run(record, f"stage-{number}", file, budget, (curves or {}).get(record.path.resolve()))
        for number, record in enumerate(records, 1)
    ]
    chain = [
        ChainLink(section, _find_sources(record, records)) for section, record in zip(sections, records, strict=True)
    ]
    seconds = [section.summary.seconds for section in sections if section.summary.seconds is not None]
    facts = {
        "name": folder.resolve().name,
        "chain": chain,
        "problems": [redact(problem) for problem in stages.problems],
        "duration": format_duration(sum(seconds)) if seconds else "",
        "open_stages": [section.summary.name for section in sections if section.summary.tone != "good"],
    }
    return render_page("pipeline.html.j2", f"{folder.resolve().name} · pipeline", chart_ids(sections), facts)


def chart_ids(sections: Sequence[RunSection]) -> dict[str, Chart]:
    """Return the charts of a page by the id of their element."""
    return {f"{section.anchor}-{chart.key}": chart for section in sections for chart in section.charts}


def _find_sources(record: RunRecord, records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Return the stages of the pipeline that a run was made from, with the role of each."""
    try:
        models = record.inputs.models if record.inputs is not None else ()
    except CheckpointError:
        return ()
    found = [
        f"{other.name} as {model.role}"
        for model in models
        for other in records
        if other is not record and Path(model.path).is_relative_to(other.path.resolve())
    ]
    return tuple(dict.fromkeys(found))


def _find_pipeline_page(record: RunRecord) -> Path | None:
    """Return the report of the pipeline that a run belongs to, if there is one beside it."""
    if record.pipeline is None:
        return None
    candidates = [record.path.resolve().parent, record.pipeline.resolve()]
    for folder in candidates:
        if folder.name == record.pipeline.name and (folder / REPORT_FILE).exists():
            return folder / REPORT_FILE
    return None


def _find_neighbours(folder: Path) -> list[Path]:
    """Return the runs beside a pipeline's folder whose settings name it."""
    folder = folder.resolve()
    if not folder.parent.is_dir():
        return []
    setting = re.compile(rf"^\s+pipeline:.*{re.escape(folder.name)}/*['\"]?\s*$", re.MULTILINE)
    found = []
    for config in sorted(folder.parent.glob("*/config.yaml"))[:_MAX_NEIGHBOURS]:
        try:
            is_named = setting.search(config.read_text("utf-8", "replace")) is not None
        except OSError:
            continue
        if not (is_named and is_run(config.parent)):
            continue
        try:
            pipeline = read_run(config.parent).pipeline
        except CheckpointError:  # a stage, as far as can be told; the page names it
            found.append(config.parent)
            continue
        if pipeline is not None and pipeline.resolve() == folder:
            found.append(config.parent)
    return found
