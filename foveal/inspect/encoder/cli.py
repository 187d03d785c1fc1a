"""Command line of `foveal inspect`."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.inference.predict_cli import DeviceOption, ExportArgument, ImagesArgument, report_unreadable

if TYPE_CHECKING:
    from foveal.inference.decoding import DecodedBatch
    from foveal.inference.image_inputs import ImageList
    from foveal.inspect.encoder.exported import InspectedEncoder

_MAX_IMAGES = 8
_NAME = 40  # characters of an image's name, from its end


def inspect_command(
    export: ExportArgument,
    images: ImagesArgument,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the pictures.")] = Path(
        "encoder-pictures"
    ),
    limit: Annotated[
        int, typer.Option(min=1, max=_MAX_IMAGES, help="Most images shown, spread evenly over those that are named.")
    ] = 6,
    device: DeviceOption = "auto",
) -> None:
    """Draw the inside of the encoder of EXPORT for a few images: features, attention, activations.

    Images that cannot be read are listed at the end, and the exit code is then 1.
    """
    from foveal.inference.image_sources import resolve_images  # with torch: after the arguments
    from foveal.inference.new_outputs import check_new
    from foveal.inference.predict import choose_device
    from foveal.inspect.encoder.exported import load_inspected_encoder

    chosen_device = choose_device(device)
    check_new(out)
    encoder = load_inspected_encoder(export, chosen_device)
    image_list = resolve_images(images, encoder.label_field)
    batch = _read_images(encoder, image_list, limit)
    if batch.num_images < len(image_list):
        typer.echo(f"{batch.num_images} of {len(image_list):,} images, spread evenly")
    _write_pictures(encoder, batch, out)
    report_unreadable(batch.unreadable, batch.num_images)


def _read_images(encoder: "InspectedEncoder", images: "ImageList", limit: int) -> "DecodedBatch":
    """Return up to ``limit`` of the images, spread evenly. Raises: DataError if none of them can be read."""
    from foveal.errors import DataError
    from foveal.inference.decoding import iter_decoded_batches

    last, count = len(images) - 1, min(limit, len(images))
    positions = sorted({round(last * number / max(1, count - 1)) for number in range(count)})
    with closing(iter_decoded_batches(images, positions, encoder.transform, len(positions))) as batches:
        batch = next(batches)
    if not batch.names:
        first = batch.unreadable[0]
        raise DataError(f"no image can be read, of {len(positions)} that were tried; {first.name}: {first.reason}")
    return batch


def _write_pictures(encoder: "InspectedEncoder", batch: "DecodedBatch", out: Path) -> None:
    """Write all pictures, or none, and print what each shows. Raises: DataError, ExportError, OutOfMemoryError."""
    import torch

    from foveal.errors import OutOfMemoryError
    from foveal.inference.new_outputs import new_outputs, writing
    from foveal.inspect.picture import save_picture

    names = tuple(name.rpartition("/")[2][-_NAME:] for name in batch.names)
    lines = []
    try:
        with new_outputs([out]) as (draft,):
            with writing(out):
                draft.mkdir()
            for name, picture in encoder.draw_pictures(batch.pixels, names):
                with writing(out):
                    save_picture(draft / f"{name}.png", picture)
                lines.append(f"{out / name}.png: {picture.description}")
    except torch.OutOfMemoryError as error:
        detail = str(error).partition(". ")[0]
        raise OutOfMemoryError(f"the encoder does not fit the GPU with an image ({detail}): set --device cpu") from None
    for line in lines:
        typer.echo(line)
