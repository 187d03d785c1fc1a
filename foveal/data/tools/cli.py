"""`foveal data`: make shards, index those of others, check them, look at them, prove what a run consumed."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.data.config import expand_path
from foveal.data.dataset import Dataset, open_dataset
from foveal.data.format.manifest import Manifest
from foveal.data.indexing.index import index_folder
from foveal.data.pack.cli import app as pack_app
from foveal.data.records.audit import format_audit_report
from foveal.data.tools.progress_bar import progress_bar
from foveal.data.tools.show import format_class_histogram, save_contact_sheet
from foveal.data.tools.verify import verify_dataset

app = typer.Typer(help="Shards: pack, index, verify, show, audit.", no_args_is_help=True)
app.add_typer(pack_app, name="pack")

_PATIENCE = 60.0  # seconds that a command at a terminal waits for a server

IndexOption = Annotated[
    str | None, typer.Option("--index", help="Where manifest.json and *.index are, if not in PATH.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads.")]


@app.command("index")
def index_command(
    path: Annotated[str, typer.Argument(help="Folder or URL of plain tar shards, SPLIT-NUMBER.tar.")],
    index: Annotated[Path | None, typer.Option("--index", help="Folder for the index; default: PATH.")] = None,
    classes: Annotated[str, typer.Option(help="Names of the classes by label, separated by commas.")] = "",
    label_key: Annotated[str | None, typer.Option(help="Entry of .json members that is the label, not .cls.")] = None,
    dotted_keys: Annotated[bool, typer.Option("--dotted-keys", help="Keys end at the last dot of a name.")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: that of the folder.")] = None,
    workers: WorkersOption = 8,
    again: Annotated[bool, typer.Option("--again", help="Walk shards again whose index is there.")] = False,
) -> None:
    """Index foreign WebDataset shards: headers are read, images are not, and no shard twice."""
    notes: list[str] = []
    with progress_bar("indexing shards") as done:
        manifest = index_folder(
            expand_path(path, "PATH"),
            None if index is None else Path(expand_path(str(index), "--index")),
            classes=[part.strip() for part in classes.split(",")] if classes else None,
            label_key=label_key,
            dotted_keys=dotted_keys,
            name=name,
            workers=workers,
            rebuild=again,
            on_warning=notes.append,
            on_progress=done,
        )
    _print_summary(manifest)
    for note in notes:
        typer.echo(note)


@app.command("verify")
def verify_command(
    path: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    index: IndexOption = None,
    full: Annotated[bool, typer.Option("--full", help="Also sha256, tar headers, and every image decoded.")] = False,
    record: Annotated[bool, typer.Option("--record", help="Write missing sha256 into the manifest.")] = False,
    workers: WorkersOption = 8,
) -> None:
    """Check shards and indices against the manifest; exit code 1 and a list if anything is wrong."""
    dataset = open_dataset(path, index, stall_timeout=_PATIENCE)
    with progress_bar("verifying shards") as done:
        wrong = verify_dataset(dataset, full=full, workers=workers, record_checksums=record, on_progress=done)
    for sentence in wrong:
        typer.echo(sentence)
    if wrong:
        raise typer.Exit(1)
    typer.echo(_format_verdict(dataset, full, record))


@app.command("show")
def show_command(
    path: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    index: IndexOption = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE.png", help="Also draw 48 images with labels.")] = None,
    split: Annotated[str | None, typer.Option(help="Split on the sheet; default: the first in the table.")] = None,
) -> None:
    """Samples, shards and bytes of every split, samples of every class, and a sheet of images."""
    dataset = open_dataset(path, index, stall_timeout=_PATIENCE)
    _print_summary(dataset.manifest)
    splits = [name for name, entry in dataset.manifest.splits.items() if entry.samples]
    if dataset.classes is not None and splits:
        typer.echo()
        for line in format_class_histogram({name: dataset.class_counts(name) for name in splits}, dataset.classes):
            typer.echo(line)
    if sheet is not None:
        save_contact_sheet(dataset, split or next(iter(splits), "train"), sheet)
        typer.echo(f"\n{sheet}: written")


@app.command("audit")
def audit_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run that was trained with data.ledger=true.")],
    against: Annotated[Path | None, typer.Option(help="Another run, to be compared slot by slot.")] = None,
) -> None:
    """Prove from a run's ledger how often every sample was seen; exit code 1 if one came twice, or if runs differ."""
    lines, well = format_audit_report(run, against)
    for line in lines:
        typer.echo(line)
    if not well:
        raise typer.Exit(1)


def _print_summary(manifest: Manifest) -> None:
    typer.echo(f"{manifest.name}: members {', '.join(manifest.fields)}; {len(manifest.classes or ())} classes")
    for split, entry in manifest.splits.items():
        size = sum(shard.bytes for shard in entry.shards)
        typer.echo(f"{split:10} {entry.samples:>14,} samples {len(entry.shards):>7,} shards {size / 1e6:>14,.1f} MB")


def _format_verdict(dataset: Dataset, full: bool, record: bool) -> str:
    shards = [shard for entry in dataset.manifest.splits.values() for shard in entry.shards]
    samples = sum(shard.samples for shard in shards)
    unknown = 0 if record else sum(shard.sha256 is None for shard in shards)
    said = f"{dataset.folder}: {samples:,} samples in {len(shards):,} shards are as the manifest says"
    if full:
        said += ", and every image decodes"
    return said + (f"; of {unknown:,} shards no sha256 is known, --record writes it" if unknown else "")
