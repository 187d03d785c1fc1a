"""Command line of `foveal inspect`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveal.inference.predict_cli import DeviceOption, ExportArgument, ImagesArgument, report_unreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveal.inference.decoding import DecodedBatch
    from foveal.inspect.encoder.exported import InspectedEncoder

_MAX_IMAGES = 8
_NAME = 40  # characters of an image's name, from its end


def inspect_command(
    export: ExportArgument,
    images: ImagesArgument,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the pictures.")] = Path("encoder-pictures"),
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
    last, count = len(image_list) - 1, min(limit, len(image_list))
    positions = sorted({round(last * number / max(1, count - 1)) for number in range(count)})
    batch = _read_images(encoder, images, limit, positions)
    if len(positions) < len(image_list):
        typer.echo(f"{len(positions)} of {len(image_list):,} images are shown")
    _write_pictures(encoder, batch, out)
    report_unreadable(batch.unreadable, len(positions))


def _read_images(encoder: "InspectedEncoder", sources: "Sequence[str]", positions: "Sequence[int]") -> "DecodedBatch":
    ...
