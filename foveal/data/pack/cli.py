"""`foveal data pack`: write images as shards. One command per source."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from foveal.data.format.manifest import read_manifest
from foveal.data.indexing.class_names import read_class_names
from foveal.data.pack.coco import pack_coco
from foveal.data.pack.digits import pack_digits
from foveal.data.pack.folder import pack_folder
from foveal.data.pack.hf import pack_hf
from foveal.data.pack.image_sources import find_sources
from foveal.data.pack.masks import pack_masks
from foveal.data.pack.options import PackOptions
from foveal.data.pack.record import RECORD_NAME, read_record
from foveal.data.pack.table import pack_table
from foveal.data.pack.writer import SKIPPED_FILE_NAME
from foveal.data.pack.yolo import pack_yolo

app = typer.Typer(help="Write images as WebDataset shards with manifest and index.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", help="Folder of the shards; it appears only when it is complete.")]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="Column of labels or class names, or lists of them; an empty cell means no label.")
]
SeparatorOption = Annotated[
    str | None,
    typer.Option(
        "--label-separator",
        help="Text between several classes in one cell, such as '|'; '': every cell is one class name, also None and NA.",
    ),
]
ListsOption = Annotated[
    str | None,
    typer.Option(
        "--label-lists",
        help="Lists in the label column hold the classes of an image (classes), or a 0 or 1 for every class (one-hot).",
    ),
]
ClassesOption = Annotated[str, typer.Option(help="Class names in the order of the ids, from 0, separated by commas.")]
ClassesFileOption = Annotated[
    Path | None, typer.Option(help="Text file of class names, one in a line; names may contain commas.")
]
UnpairedOption = Annotated[
    str | None,
    typer.Option(help="'skip' leaves out and counts images and labels without each other. Default: they are refused."),
]

_MAX_NAMED = 5  # classes in a summary

_OPTIONS: dict[str, Any] = {  # fields of PackOptions and their types on the command line
    "name": str,
    "shard_mb": float,
    "samples_per_shard": int,
    "val_fraction": float,
    "workers": int,
    "resize": int,
    "format": str,
    "quality": int,
    "bit_depth": int,
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
    out: OutOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="Folder of images, or of one sub-folder of images per class, or of train/ and val/ with either. Also "
            "several folders and files, and quoted globs such as '/data/photos/**/*.jpg'.",
            show_default=False,
        ),
    ] = None,
    files_from: Annotated[
        str | None,
        typer.Option(
            metavar="LIST.txt",
            help="Text file with one path per line, or separated by zero bytes as of find -print0; '-': standard input.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="none|folders",
            help="'none' packs images at any depth without labels; 'folders': sub-folders are classes. Default: images in "
            "one folder have no labels, one level of sub-folders is the classes, and everything else is refused.",
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            help="Folders of the splits, such as train=training,val=dev or train=a/train; 'none': no folder is a split. "
            "Default: folders with the usual names are splits."
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Files that are named as masks or other labels, such as a_mask.png beside a.png and masks/ beside "
            "images/: 'skip' leaves them out, 'pack' takes them as images. Default: they are refused."
        ),
    ] = None,
    **options: Any,
) -> None:
    """Pack images in folders, with or without labels. Files are stored unchanged unless an option changes them."""
    sources = find_sources(paths or [], files_from)
    written = pack_folder(sources, out, labels=labels, splits=splits, masks=masks, **_drop_unset(options))
    _print_result(out, written, sources.root)


@app.command("table")
@_add_pack_options
def table_command(
    path: Annotated[Path, typer.Argument(help="Table with one row per image: .csv, .tsv or .parquet.")],
    out: OutOption,
    image_column: Annotated[str, typer.Option(help="Column of image paths, or of images in Parquet.")] = "image",
    label_column: LabelColumnOption = None,
    split_column: Annotated[str | None, typer.Option(help="Column of split names, such as train and val.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that relative paths start from; default: the table's folder.")
    ] = None,
    label_separator: SeparatorOption = None,
    label_lists: ListsOption = None,
    **options: Any,
) -> None:
    """Pack the images that a table lists."""
    written = pack_table(
        path,
        out,
        image_column=image_column,
        label_column=label_column,
        split_column=split_column,
        image_root=root,
        label_separator=label_separator,
        label_lists=label_lists,
        **_drop_unset(options),
    )
    _print_result(out, written, path)


@app.command("hf")
@_add_pack_options
def hf_command(
    path: Annotated[Path, typer.Argument(help="Folder written by save_to_disk, or readable by load_dataset.")],
    out: OutOption,
    image_column: Annotated[
        str | None, typer.Option(help="Column of images; default: the only one of type Image.")
    ] = None,
    label_column: LabelColumnOption = None,
    label_separator: SeparatorOption = None,
    label_lists: ListsOption = None,
    **options: Any,
) -> None:
    """Pack a Hugging Face `datasets` folder. Bytes are stored unchanged unless an option changes them."""
    written = pack_hf(
        path,
        out,
        image_column=image_column,
        label_column=label_column,
        label_separator=label_separator,
        label_lists=label_lists,
        **_drop_unset(options),
    )
    _print_result(out, written, path)


@app.command("masks")
@_add_pack_options
def masks_command(
    images: Annotated[Path, typer.Argument(help="Folder of the images; of images and masks, if MASKS is omitted.")],
    out: OutOption,
    masks: Annotated[
        Path | None,
        typer.Argument(help="Folder of the masks, whose files are named as the images, perhaps with an ending."),
    ] = None,
    classes: ClassesOption = "",
    classes_file: ClassesFileOption = None,
    mask_suffix: Annotated[
        str | None, typer.Option(help="Ending of the masks' names, such as _labelIds, if an image has several.")
    ] = None,
    map_ids: Annotated[
        str | None,
        typer.Option(help="Ids to write in place of others: 255=1 makes masks of 0 and 255 classes 0 and 1."),
    ] = None,
    ignore_id: Annotated[
        int | None, typer.Option(min=0, help="Id of pixels without a class, as data.ignore_id; default: 255.")
    ] = None,
    unpaired: UnpairedOption = None,
    **options: Any,
) -> None:
    """Pack images with masks of class ids, for task=segmentation. Splits are folders such as train/ and val/."""
    written = pack_masks(
        images,
        out,
        mask_folder=masks,
        classes=read_class_names(classes, classes_file),
        mask_suffix=mask_suffix,
        map_ids=map_ids,
        ignore_id=ignore_id,
        unpaired=unpaired,
        **_drop_unset(options),
    )
    _print_result(out, written, images)


@app.command("coco")
@_add_pack_options
def coco_command(
    images: Annotated[Path, typer.Argument(help="Folder of the images, or of folders of them such as train2017/.")],
    annotations: Annotated[
        list[str],
        typer.Argument(
            help="COCO's JSON files of instances, one per split: FILE, whose name has the split, or SPLIT=FILE."
        ),
    ],
    out: OutOption,
    unpaired: UnpairedOption = None,
    **options: Any,
) -> None:
    """Pack images with boxes of COCO's JSON files, for task=detection."""
    written = pack_coco(images, out, annotations, unpaired=unpaired, **_drop_unset(options))
    _print_result(out, written, images)


@app.command("yolo")
@_add_pack_options
def yolo_command(
    path: Annotated[Path, typer.Argument(help="data.yaml, or a folder with it, or with images/ and labels/.")],
    out: OutOption,
    classes: ClassesOption = "",
    classes_file: ClassesFileOption = None,
    unpaired: UnpairedOption = None,
    **options: Any,
) -> None:
    """Pack images with boxes of YOLO's text files, for task=detection."""
    names = read_class_names(classes, classes_file)
    written = pack_yolo(path, out, classes=names, unpaired=unpaired, **_drop_unset(options))
    _print_result(out, written, path)


def _drop_unset(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_result(out: Path, written: bool, source: Path | None = None) -> None:
    """Print what the folder holds and how its source was understood."""
    manifest = read_manifest(out)
    record = read_record(out)
    num_samples = sum(split.samples for split in manifest.splits.values())
    splits = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    summary = f"{num_samples:,} samples of '{manifest.name}': {splits}; {_describe_classes(manifest.classes)}"
    typer.echo(f"{out}: written, {summary}" if written else f"{out}: already there, nothing to do; it holds {summary}")
    for line in (*record.summary, *record.notes) if record else ():
        typer.echo(f"  {line}")
    if record is None:
        typer.echo(f"  it has no {RECORD_NAME}: what it was made from, and with which options, is not known")
    elif source is not None and not source.exists():
        typer.echo(f"  {source} is not there: whether the shards were made from it is not known")
    if written and (out / SKIPPED_FILE_NAME).is_file():
        skipped = (out / SKIPPED_FILE_NAME).read_text().splitlines()
        typer.echo(
            f"{len(skipped):,} images do not decode and were left out; "
            f"{out / SKIPPED_FILE_NAME} lists them, the first is:"
        )
        typer.echo(skipped[0].replace("\t", "  "))


def _describe_classes(classes: tuple[str, ...] | None) -> str:
    """Return the number of classes and the first names."""
    if classes is None:
        return "no classes"
    names = ", ".join(classes[:_MAX_NAMED]) + (", ..." if classes[_MAX_NAMED:] else "")
    return f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}: {names}"
