"""`foveal data pack`: write images as shards. One command per source."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.data.format.manifest import read_manifest
from foveal.data.pack.digits import pack_digits
from foveal.data.pack.folder import pack_folder
from foveal.data.pack.hf import pack_hf
from foveal.data.pack.options import PackOptions
from foveal.data.pack.table import pack_table
from foveal.data.pack.writer import SKIPPED_FILE_NAME

app = typer.Typer(help="Write images as WebDataset shards with manifest and index.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", help="Folder of the shards; it appears only when it is complete.")]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="Column of labels or class names; an empty cell means no label.")
]

_OPTIONS: dict[str, Any] = {  # fields of PackOptions and their types on the command line
    "name": str,
    "shard_mb": float,
    "samples_per_shard": int,
    "val_fraction": float,
    "workers": int,
    "resize": int,
    "format": str,
    "quality": int,
    "skip_bad": bool,
}


def _add_pack_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's ``**options`` by the fields of PackOptions in the signature that typer reads."""
    parameters = list(inspect.signature(command).parameters.values())[:-1]
    for name, kind in _OPTIONS.items():
        field = PackOptions.model_fields[name]
        default = None if field.default_factory else field.default or None
        option = typer.Option(f"--{name.replace('_', '-')}", help=field.description)
        annotation = Annotated[kind if default else kind | None, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


@app.command("digits")
def digits_command(out: OutOption) -> None:
    """Pack scikit-learn's 1,797 handwritten digits, 8x8 pixels: the data set of the demo."""
    _print_result(out, pack_digits(out))


@app.command("folder")
@_add_pack_options
def folder_command(
    path: Annotated[
        Path,
        typer.Argument(help="Folder with one sub-folder of images per class, or with train/ and val/ that have them."),
    ],
    out: OutOption,
    **options: Any,
) -> None:
    """Pack folders of images. Files are stored unchanged unless an option changes them."""
    _print_result(out, pack_folder(path, out, **_drop_unset(options)))


@app.command("table")
@_add_pack_options
def table_command(
    path: Annotated[Path, typer.Argument(help="Table with one row per image: .csv or .parquet.")],
    out: OutOption,
    image_column: Annotated[str, typer.Option(help="Column of image paths.")] = "image",
    label_column: LabelColumnOption = None,
    split_column: Annotated[str | None, typer.Option(help="Column of split names, such as train and val.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from; default: the table's folder.")
    ] = None,
    **options: Any,
) -> None:
    """Pack the images that a table lists."""
    columns = {"image_column": image_column, "label_column": label_column, "split_column": split_column}
    _print_result(out, pack_table(path, out, **columns, image_root=root, **_drop_unset(options)))


@app.command("hf")
@_add_pack_options
def hf_command(
    path: Annotated[Path, typer.Argument(help="Folder written by save_to_disk, or readable by load_dataset.")],
    out: OutOption,
    image_column: Annotated[
        str | None, typer.Option(help="Column of images; default: the only one of type Image.")
    ] = None,
    label_column: LabelColumnOption = None,
    **options: Any,
) -> None:
    """Pack a Hugging Face `datasets` folder. Bytes are stored unchanged unless an option changes them."""
    _print_result(out, pack_hf(path, out, image_column=image_column, label_column=label_column, **_drop_unset(options)))


def _drop_unset(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_result(out: Path, written: bool) -> None:
    manifest = read_manifest(out)
    summary = f"{sum(split.samples for split in manifest.splits.values()):,} samples of '{manifest.name}'"
    typer.echo(f"{out}: written, {summary}" if written else f"{out}: already there, nothing to do; it holds {summary}")
    if written and (out / SKIPPED_FILE_NAME).is_file():
        skipped = (out / SKIPPED_FILE_NAME).read_text().splitlines()
        typer.echo(
            f"{len(skipped):,} images do not decode and were left out; "
            f"{out / SKIPPED_FILE_NAME} lists them, the first is:"
        )
        typer.echo(skipped[0].replace("\t", "  "))
