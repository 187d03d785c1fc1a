"""``foveal export``: hand a model over to timm, transformers, ONNX, torch.export or any reader of safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from foveal.convert.formats import Conversion, convert
from foveal.convert.request import Options


def export_command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|EXPORT", help="The directory of a finished run, or an export in it.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="timm, hf, onnx, pt2 or safetensors.")],
    out: Annotated[Path | None, typer.Option(help="The new folder; default: EXPORT-FORMAT, beside the export.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images for the comparison; default: photographs of scikit-learn.")
    ] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="onnx, pt2: the graph takes pixels, uint8, and normalises them.")
    ] = False,
    patches: Annotated[
        bool, typer.Option("--patches", help="onnx, pt2: an encoder's patch features are outputs too.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="safetensors: fp32, bf16 or fp16.")] = "fp32",
) -> None:
    """Write a model for another library, open it there, compare it with foveal's on real images."""
    conversion = convert(source, to, out, images, Options(patches=patches, preprocess=preprocess, dtype=dtype))
    for line in report_lines(conversion):
        typer.echo(line)


def report_lines(conversion: Conversion) -> list[str]:
    """Return what the comparison measured, the loading lines, and the folder."""
    reopened = conversion.reopened
    limit = "no limit: weights were rounded" if reopened.tolerance is None else f"limit {reopened.tolerance:.0e}"
    lines = [f"opened by {reopened.library}, compared on {conversion.num_images} images:"]
    lines += [
        f"  {difference.output}: largest difference {difference.absolute:.1e}, {difference.relative:.1e} of the largest "
        f"value ({limit})"
        for difference in conversion.differences
    ]
    lines += reopened.notes
    code = reopened.loading.format(folder=conversion.folder).splitlines()
    return [*lines, *(f"  {line}" for line in code), f"done: {conversion.folder}"]
