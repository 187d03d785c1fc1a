"""`foveal data`: make shards, index those of others, look at them."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.data.config import expanded
from foveal.data.dataset import open_folder
from foveal.data.index import index_folder
from foveal.data.manifest import Manifest
from foveal.data.pack import pack_digits, pack_folder

app = typer.Typer(help="Shards: pack, index, show.", no_args_is_help=True)
pack_app = typer.Typer(help="Write images as WebDataset shards with manifest and index.", no_args_is_help=True)
app.add_typer(pack_app, name="pack")

Out = Annotated[Path, typer.Option("--out", help="Folder of the shards; made whole or not at all.")]
Index = Annotated[Path | None, typer.Option("--index", help="Folder of manifest.json and *.index, if not PATH.")]


@pack_app.command("digits")
def digits(out: Out) -> None:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels: the data set of the demo."""
    _say_packed(out, pack_digits(out))


@pack_app.command("folder")
def folder(
    path: Annotated[Path, typer.Argument(help="One folder of images per class, or train/ and val/ with these.")],
    out: Out,
    val_fraction: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share for validation if there is no val/.")
    ] = 0.1,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
) -> None:
    """Your own images, files as they are."""
    _say_packed(out, pack_folder(path, out, val_fraction=val_fraction, samples_per_shard=samples_per_shard))


@app.command("index")
def index(
    path: Annotated[str, typer.Argument(help="Folder or URL of plain tar shards, SPLIT-NUMBER.tar.")],
    index: Index = None,
    classes: Annotated[str, typer.Option(help="Names of the classes by label, separated by commas.")] = "",
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: that of the folder.")] = None,
) -> None:
    """Index foreign WebDataset shards: headers are read, images are not."""
    names = [part.strip() for part in classes.split(",")] if classes else None
    _show(index_folder(expanded(path, "PATH"), index, classes=names, name=name))


@app.command("show")
def show(path: Annotated[str, typer.Argument(help="Folder or URL of shards.")], index: Index = None) -> None:
    """Samples, shards and bytes of every split, and samples of every class."""
    dataset = open_folder(path, None if index is None else str(index))
    _show(dataset.manifest)
    names = dataset.classes
    if names is None:
        return
    counts = {split: dataset.class_counts(split) for split in dataset.manifest.splits}
    width = max(len(name) for name in (*names, "class"))
    typer.echo(f"\n{'class':{width}}" + "".join(f"{split:>10}" for split in counts))
    for label, name in enumerate(names):
        typer.echo(f"{name:{width}}" + "".join(f"{numbers[label]:>10,}" for numbers in counts.values()))


def _say_packed(out: Path, written: bool) -> None:
    typer.echo(f"{out}: {'written' if written else 'already there, nothing to do'}")


def _show(manifest: Manifest) -> None:
    typer.echo(f"{manifest.name}: members {', '.join(manifest.fields)}; {len(manifest.classes or ())} classes")
    for split, entry in manifest.splits.items():
        size = sum(shard.bytes for shard in entry.shards)
        typer.echo(f"{split:10} {entry.samples:>10,} samples {len(entry.shards):>7,} shards {size / 1e6:>12,.1f} MB")
