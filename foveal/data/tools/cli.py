"""`foveal data`: pack, index, verify and show shards, and audit the samples that a run consumed."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from foveal.data.config import DataConfig, expand_path
from foveal.data.dataset import Dataset, open_unchecked_dataset
from foveal.data.format.manifest import Manifest
from foveal.data.image.targets import LabelReader, LabelSurvey
from foveal.data.indexing.class_names import read_class_names
from foveal.data.indexing.index import index_folder
from foveal.data.pack.cli import app as pack_app
from foveal.data.records.audit import format_audit_report
from foveal.data.tools.label_members import describe_fields, find_label_members
from foveal.data.tools.progress_bar import progress_bar
from foveal.data.tools.show import format_class_histogram, save_contact_sheet
from foveal.data.tools.verify import verify_dataset
from foveal.errors import ConfigError

app = typer.Typer(help="Shards: pack, index, verify, show, audit.", no_args_is_help=True)
app.add_typer(pack_app, name="pack")

_STALL_TIMEOUT = 60.0  # seconds without data after which an interactive command gives up

IndexOption = Annotated[
    str | None, typer.Option("--index", help="Folder or URL of manifest.json and *.index; default: PATH.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads.")]
LabelFieldOption = Annotated[str | None, typer.Option(help="With --task: as data.label_field; default: the task's.")]
IgnoreIdOption = Annotated[int, typer.Option(min=0, help="Of masks: as data.ignore_id.")]


@app.command("index")
def index_command(
    path: Annotated[
        str, typer.Argument(help="Folder or URL of plain tar shards, SPLIT-NUMBER.tar or SPLIT-NUMBER-of-TOTAL.tar.")
    ],
    index: Annotated[Path | None, typer.Option("--index", help="Folder for the index; default: PATH.")] = None,
    classes: Annotated[str, typer.Option(help="Class names in the order of the labels, separated by commas.")] = "",
    classes_file: Annotated[
        Path | None, typer.Option(help="Text file of class names, one in a line; names may contain commas.")
    ] = None,
    numeric_labels: Annotated[
        str | None,
        typer.Option(help="With names that are numbers: labels are these 'names', or 'positions' from 0 among them."),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Entry of .json members with the label; default: .cls members.")
    ] = None,
    dotted_keys: Annotated[
        bool, typer.Option("--dotted-keys", help="A key ends at the last dot of a name; default: at the first.")
    ] = False,
    image_field: Annotated[
        str | None,
        typer.Option(help="Member with the image, such as input.jpg; default: jpg, png, ..., or the only image."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: the folder's name.")] = None,
    bit_depth: Annotated[
        int | None,
        typer.Option(min=9, max=16, help="Bits that images stored in 16 bits per pixel use, such as 12 of a sensor."),
    ] = None,
    workers: WorkersOption = 8,
    again: Annotated[bool, typer.Option("--again", help="Also index shards that have an index.")] = False,
) -> None:
    """Index existing WebDataset shards. Reads tar headers and labels, not images; indexed shards are skipped."""
    notes: list[str] = []
    with progress_bar("indexing shards") as on_progress:
        manifest = index_folder(
            expand_path(path, "PATH"),
            None if index is None else Path(expand_path(str(index), "--index")),
            classes=read_class_names(classes, classes_file),
            label_key=label_key,
            dotted_keys=dotted_keys,
            image_field=image_field,
            numeric_labels=numeric_labels,
            name=name,
            bit_depth=bit_depth,
            workers=workers,
            rebuild=again,
            on_warning=notes.append,
            on_progress=on_progress,
        )
    _print_summary(manifest)
    for line in [*describe_fields(manifest.fields, label_key), *notes]:
        typer.echo(line)


@app.command("verify")
def verify_command(
    path: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    index: IndexOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Also check sha256 and tar headers, decode every image, and read labels.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Compute missing sha256 and write them into the manifest.")
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(help="With --full: read labels as this task of fine-tuning does; default: as their members look."),
    ] = None,
    label_field: LabelFieldOption = None,
    ignore_id: IgnoreIdOption = 255,
    workers: WorkersOption = 8,
) -> None:
    """Check shards and indices against the manifest; list all faults and exit with 1 if there are any."""
    if task is not None and not full:
        raise ConfigError(f"--task {task} is for --full, which reads samples: give both")
    dataset = open_unchecked_dataset(path, index, stall_timeout=_STALL_TIMEOUT)
    reader = _make_label_reader(dataset, task, label_field, ignore_id)
    members = find_label_members(dataset, ignore_id) if full and task is None else None
    readers = members.readers if members is not None else (reader,) if reader is not None else ()
    surveys = {split: [each.make_survey() for each in readers] for split in dataset.manifest.splits}
    with progress_bar("verifying shards") as on_progress:
        faults = verify_dataset(
            dataset,
            full=full,
            workers=workers,
            label_surveys=surveys,
            require_labels=task is not None,
            record_missing_checksums=record,
            on_progress=on_progress,
        )
    for line in [*faults, *_format_surveys(dataset, surveys, members.unread_fields if members is not None else ())]:
        typer.echo(line)
    if faults:
        raise typer.Exit(1)
    typer.echo(_format_verdict(dataset, full, record))


@app.command("show")
def show_command(
    path: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    index: IndexOption = None,
    sheet: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Also write a contact sheet: up to 48 images with labels.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the sheet; default: the first in the table.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Show labels on the sheet as this task of fine-tuning reads them.")
    ] = None,
    label_field: LabelFieldOption = None,
    ignore_id: IgnoreIdOption = 255,
) -> None:
    """Print samples, shards and bytes per split and samples per class; optionally write a contact sheet."""
    if task is not None and sheet is None:
        raise ConfigError(f"--task {task} is for --sheet, which shows labels: give both")
    dataset = open_unchecked_dataset(path, index, stall_timeout=_STALL_TIMEOUT)
    _print_summary(dataset.manifest)
    splits = [name for name, entry in dataset.manifest.splits.items() if entry.samples]
    if dataset.classes is not None and splits:
        typer.echo()
        for line in format_class_histogram({name: dataset.class_counts(name) for name in splits}, dataset.classes):
            typer.echo(line)
    if sheet is not None:
        label_reader = _make_label_reader(dataset, task, label_field, ignore_id)
        save_contact_sheet(dataset, split or next(iter(splits), "train"), sheet, label_reader)
        typer.echo(f"\n{sheet}: written")


@app.command("audit")
def audit_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run with data.ledger=true.")],
    against: Annotated[Path | None, typer.Option(help="Directory of another run, compared slot by slot.")] = None,
) -> None:
    """Count from a run's ledger how often it consumed every sample; exit with 1 on duplicates or if two runs differ."""
    lines, passes = format_audit_report(run, against)
    for line in lines:
        typer.echo(line)
    if not passes:
        raise typer.Exit(1)


def _make_label_reader(
    dataset: Dataset, task: str | None, label_field: str | None, ignore_id: int
) -> LabelReader | None:
    """Return the task's reader of labels; None without a task, or for labels of the index.

    Raises: ConfigError for an unknown task, DataError if the data set has no such labels.
    """
    if task is None:
        return None
    # The import is dynamic, because tasks import foveal and never the reverse.
    find_task = importlib.import_module("finetune.tasks.registry").find_task
    cfg = DataConfig(path=dataset.folder, image_size=1, label_field=label_field, ignore_id=ignore_id)
    return find_task(task).make_label_reader(cfg, dataset)


def _format_surveys(
    dataset: Dataset, surveys: Mapping[str, Sequence[LabelSurvey]], unread_fields: Sequence[str]
) -> Iterator[str]:
    """Yield lines about labels: what was read, what it shows beside faults, and members that are missing or unread."""
    for split, survey in ((split, survey) for split, of_split in surveys.items() for survey in of_split):
        place = f"split '{split}', .{survey.field}"
        if survey.num_labels:
            yield f"{place}: {survey.summary()}"
            for finding in survey.content_findings(is_complete=True):
                if finding.severity != "fault":
                    yield f"{place}: {finding.sentence}"
        if survey.num_missing:
            of_all = f"{survey.num_missing:,} of {dataset.manifest.splits[split].samples:,} samples"
            yield f"{place}: {of_all} have no such member, and a task that reads it refuses them"
    if unread_fields:
        yield (
            f"members not read: .{', .'.join(unread_fields)} (--task TASK --label-field {unread_fields[0]} reads a label)"
        )


def _print_summary(manifest: Manifest) -> None:
    typer.echo(f"{manifest.name}: members {', '.join(manifest.fields)}; {len(manifest.classes or ()) or 'no'} classes")
    for split, entry in manifest.splits.items():
        size = sum(shard.bytes for shard in entry.shards)
        names = " to ".join(dict.fromkeys(shard.file for shard in entry.shards[:1] + entry.shards[-1:]))
        typer.echo(
            f"{split:10} {entry.samples:>14,} samples {len(entry.shards):>7,} shards {size / 1e6:>14,.1f} MB  {names}".rstrip()
        )


def _format_verdict(dataset: Dataset, full: bool, record: bool) -> str:
    shards = [shard for entry in dataset.manifest.splits.values() for shard in entry.shards]
    samples = sum(shard.samples for shard in shards)
    num_without_sha256 = 0 if record else sum(shard.sha256 is None for shard in shards)
    verdict = f"{dataset.folder}: {samples:,} samples in {len(shards):,} shards are as the manifest says"
    if full:
        verdict += ", and every image decodes"
    if num_without_sha256:
        verdict += f"; the manifest has no sha256 for {num_without_sha256:,} shards, --record writes it"
    return verdict
