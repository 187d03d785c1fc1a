"""Command line of `foveal predict`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.data.tools.progress_bar import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveal.inference.decoding import UnreadableImage

ExportArgument = Annotated[str, typer.Argument(help="An export, or the directory of a finished run.", metavar="EXPORT")]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        help="Image files, folders with all below, globs, shards (.tar), packed data sets, or URLs of these.",
        metavar="IMAGES",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]


def predict_command(
    export: ExportArgument,
    images: ImagesArgument,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to write, in .csv, .parquet or .jsonl; default: text on the screen."),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Most rows per image; default: 5 classes, or all classes and boxes within it."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 32,
    device: DeviceOption = "auto",
    overlays: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for a drawing of every image and its prediction.")
    ] = None,
) -> None:
    """Predict with the model of EXPORT: classes with scores, masks, or boxes.

    Images that cannot be read are listed at the end, and the exit code is then 1.
    """
    from foveal.inference.exported_model import load_exported_model  # with torch: after the arguments
    from foveal.inference.image_sources import resolve_images
    from foveal.inference.predict import PredictionOutputs, choose_device, find_predicting_task, predict_images

    outputs, chosen_device = PredictionOutputs(out, overlays), choose_device(device)
    outputs.check()
    model = load_exported_model(export)
    find_predicting_task(model)
    image_list = resolve_images(images, model.settings.get("data.label_field"))
    with progress_bar("predicting") as on_progress:
        counts = predict_images(
            model, image_list, outputs, batch_size=batch_size, device=chosen_device, top=top, on_progress=on_progress
        )
    if out is not None:
        typer.echo(f"{out}: {counts.rows:,} rows of {counts.images:,} images")
    for folder, num_files in counts.folders.items():
        typer.echo(f"{folder}: {num_files:,} files")
    report_unreadable(counts.unreadable, len(image_list))


def report_unreadable(unreadable: "Sequence[UnreadableImage]", num_images: int) -> None:
    """List unreadable images on stderr and end with exit code 1; without any do nothing."""
    if not unreadable:
        return
    typer.echo(f"foveal: {len(unreadable):,} of {num_images:,} images cannot be read and were left out:", err=True)
    for image in unreadable:
        typer.echo(f"  {image.name}: {image.reason}", err=True)
    raise typer.Exit(1)
