"""How far are outputs in timm, transformers, onnxruntime and torch.export from foveal's, by kind of model?

    PYTHONPATH=.:tests/support python benchmarks/exports.py --out benchmarks/results/exports.md

Every kind of model, at the sizes of a ViT-S and tiny, with drawn weights, is exported by `foveal export`, opened again
by the format's library, and compared in fp32 on photographs in batches of 1, 3 and 4 images. The largest difference
over outputs and batches, relative to the output's largest value; a refusal is the reason that the command gives.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import described
from tiny_exports import DETECTOR, KINDS, SEGMENTER, vit_card, written
from tiny_pretraining import finished_run

from foveal.convert.compare import TOLERANCE
from foveal.convert.formats import FORMATS, convert
from foveal.convert.request import Options
from foveal.errors import ExportError
from foveal.models.backbone import backbone_card

Case = tuple[dict[str, Any], dict[str, Any] | None]
LARGE = {"patch": 16, "width": 384, "depth": 12, "heads": 6}
LARGER: dict[str, Case] = {
    "ViT-S/16": (vit_card(size=224, **LARGE), None),
    "ViT-S/16, classifier": (vit_card(size=224, classes=3, **LARGE), None),
    "ViT-S/16, 160 x 320 pixels": (vit_card(size=(160, 320), **LARGE), None),
    "ViT-S/14, registers, layer scale": (
        vit_card("vit_small_patch14_reg4_dinov2", 224, positions="learned", **(LARGE | {"patch": 14})),
        None,
    ),
    "ViT-S/16, relative": (vit_card("vit_relpos_medium_patch16_cls_224", 224, positions=None, **LARGE), None),
    "ViT-S/16, rotary": (vit_card("vit_small_patch16_rope_224", 224, positions=None, **LARGE), None),
    "ViT-S/16, segmenter": (vit_card(size=224, **LARGE), SEGMENTER),
    "ViT-S/16, detector": (vit_card(size=224, **LARGE), DETECTOR | {"strides": [8, 16, 32]}),
    "ResNet-50, classifier": (backbone_card("resnet50", 224, 3, 3), None),
    "ConvNeXt-T": (backbone_card("convnext_tiny", 224, 3), None),
}


def cell(export: Path, to: str, options: Options | None, reasons: list[str]) -> tuple[str, str]:
    """The largest relative difference, or the number of the reason why there is none; and how the folder was opened."""
    try:
        conversion = convert(export, to, export.with_name(f"{to}-{time.monotonic_ns()}"), options=options)
    except ExportError as error:
        reason = str(error).replace(str(export), "EXPORT").replace(str(export.parent), "RUN")
        if reason not in reasons:
            reasons.append(reason)
        return f"refused [{reasons.index(reason) + 1}]", ""
    largest = max(difference.relative for difference in conversion.differences)
    return f"{largest:.1e}", conversion.reopened.library.rpartition(" as ")[2]


def row(name: str, export: Path, reasons: list[str]) -> str:
    """A line of the table."""
    columns = []
    for to in FORMATS:
        text, library = cell(export, to, None, reasons)
        columns.append(f"{text}, {library}" if to == "hf" and library else text)
    columns.append(cell(export, "safetensors", Options(dtype="bf16"), reasons)[0])
    return f"| {name} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="Markdown file; default: print")
    parser.add_argument("--tiny", action="store_true", help="the tiny models only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, Case] = {f"tiny: {name}": make() for name, make in KINDS.items()}
    cases |= {} if arguments.tiny else LARGER
    reasons: list[str] = []
    lines = []
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as place:
            lines.append(row(name, written(Path(place, "export"), *case, std=0.02), reasons))
            print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as place:
        run = finished_run(Path(place, "run"), **({} if arguments.tiny else _large_run()))
        text, library = cell(run, "hf", None, reasons)
    packages = ("torch", "timm", "transformers", "onnx", "onnxruntime", "onnxscript", "safetensors")
    table = [
        "# Exports in other libraries",
        "",
        "`PYTHONPATH=.:tests/support python benchmarks/exports.py --out FILE`",
        "",
        f"{described(packages)}.",
        "",
        "Largest difference to foveal's outputs in fp32 on the CPU, relative to the output's largest value, on four",
        "photographs in batches of 1, 3 and 4; weights are drawn. `foveal export` refuses to publish a folder above",
        f"{TOLERANCE:.0e}; half precision has no limit, because weights are rounded.",
        "",
        f"| model | {' | '.join(FORMATS)} | safetensors, bf16 |",
        "|---|" + "--:|" * (len(FORMATS) + 1),
        *lines,
        "",
        f"A pretraining run with its decoder, `--to hf`: {text}, {library}.",
        "",
        *(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)),
    ]
    if arguments.out is not None:
        arguments.out.write_text("\n".join(table) + "\n")
    else:
        print("\n".join(table))


def _large_run() -> dict[str, Any]:
    return {
        "data": {"path": "data/none", "image_size": 224, "channels": 3},
        "model": {"name": "vit_small_patch16_224"} | LARGE,
        "decoder": {"width": 256, "depth": 4, "heads": 8},
    }


if __name__ == "__main__":
    main()
