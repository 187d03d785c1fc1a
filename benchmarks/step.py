"""Whole training steps of foveal and its peers: interleaved in one process, as ratios of paired times.

    PYTHONPATH=. python benchmarks/step.py --data FOLDER --out benchmarks/results/step.md

FOLDER has tar shards of photographs. transformers and lightly are measured where they are installed. A round times every
contender once, in an order that is reversed every other round; a ratio is a peer's time over foveal's in one round.
"""

import argparse
import gc
import importlib.util
import io
import statistics
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from machine import described
from PIL import Image
from step_contenders import CONTENDERS, Contender, Shape, Switches
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from foveal.doctor.node_checks import measure_matmul_rates
from foveal.doctor.report import RankReport
from foveal.engines.attention import choose_max_explicit_tokens
from foveal.engines.config import EngineConfig, Precision

DECODER = (512, 8, 16)
SHAPES = {
    "CIFAR, ViT-Ti/2": Shape("vit_tiny_patch16_224", 32, 2, (192, 4, 3), 32),
    "ViT-S/16": Shape("vit_small_patch16_224", 224, 16, DECODER, 8),
    "ViT-B/16": Shape("vit_base_patch16_224", 224, 16, DECODER, 8),
    "ViT-L/16": Shape("vit_large_patch16_224", 224, 16, DECODER, 8),
}
GPU_BATCH = 256
PUBLISHED = Switches()
MODES: dict[str, tuple[Precision, Literal["highest", "medium"]]] = {
    "fp32": ("fp32", "highest"),
    "fp32, medium products": ("fp32", "medium"),
    "bf16": ("bf16", "highest"),
}
PEER_HEADING = (
    "| shape | mode | contender | ms a step | time over foveal's | loss |",
    "|---|---|---|--:|--:|--:|",
)
MAX_LOSS_DIFFERENCE, MAX_SIZE_DIFFERENCE = (
    0.02,
    0.005,
)  # of a first loss, whose masks are drawn apart, and of parameters


def read_photographs(folder: Path, count: int, size: int, device: torch.device) -> Tensor:
    """Return uint8 images [count, 3, size, size], center crops of the first in the shards."""
    found: list[Tensor] = []
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".png")) and len(found) < count:
                    data = tar.extractfile(member)
                    assert data is not None
                    image = pil_to_tensor(Image.open(io.BytesIO(data.read())).convert("RGB"))
                    found.append(center_crop(resize(image, [size], antialias=True), [size, size]))
    assert found, f"{folder} has no photographs in train-*.tar"
    return torch.stack([found[number % len(found)] for number in range(count)]).to(device)


def contenders(shape: Shape, images: Tensor, mode: str, *, compiled: bool) -> Iterator[tuple[str, str, Contender]]:
    """Yield (name, matmul precision, contender) of foveal, and of each peer as published and with foveal's switches."""
    precision, matmul = MODES[mode]
    ours = replace(PUBLISHED, matmul=matmul, fused_adamw=True, reads_every_loss=False, compiled=compiled)
    yield "foveal", matmul, CONTENDERS["foveal"](shape, images, precision, ours)
    cfg = EngineConfig(precision=precision, float32_matmul_precision=matmul)
    ours = replace(ours, explicit_attention=choose_max_explicit_tokens(cfg, images.device.type) > 0)
    for name in ("textbook", "transformers", "lightly"):
        if name != "textbook" and importlib.util.find_spec(name) is None:
            continue
        yield f"{name}, as published", "highest", CONTENDERS[name](shape, images, precision, PUBLISHED)
        yield f"{name}, same switches", matmul, CONTENDERS[name](shape, images, precision, ours)


def compare(name: str, shape: Shape, mode: str, options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Yield the table rows of a shape and a mode: milliseconds a step, and the ratios of paired rounds.

    options: data, compile, rounds and steps, as on the command line.
    """
    images = read_photographs(options.data, shape.batch, shape.image, device)
    racers = list(contenders(shape, images, mode, compiled=options.compile))
    losses = {racer: run(matmul, contender, 1, device)[1] for racer, matmul, contender in racers}
    sizes = {racer: contender.num_parameters for racer, _, contender in racers}
    for found, allowed in ((losses, MAX_LOSS_DIFFERENCE), (sizes, MAX_SIZE_DIFFERENCE)):
        assert max(abs(value / found["foveal"] - 1) for value in found.values()) < allowed, f"no peers: {found}"
    for _, matmul, contender in racers:
        run(matmul, contender, 1, device)
    seconds: dict[str, list[float]] = {racer: [] for racer, _, _ in racers}
    for number in range(options.rounds):
        for racer, matmul, contender in racers[:: -1 if number % 2 else 1]:
            seconds[racer].append(run(matmul, contender, options.steps, device)[0])
    for racer, times in seconds.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(times, seconds["foveal"], strict=True))
        yield (
            f"| {name} | {mode}{', compiled' if options.compile else ''} | {racer} | {statistics.median(times) * 1e3:,.0f} | "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f}) | {losses[racer]:.4f} |"
        )


def run(matmul: str, contender: Contender, count: int, device: torch.device) -> tuple[float, float]:
    """Return seconds a step, and the last loss."""
    torch.set_float32_matmul_precision(matmul)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    loss = contender.train(count)
    return (time.perf_counter() - began) / count, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="tar shards of photographs")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["CIFAR, ViT-Ti/2", "ViT-S/16"])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps of a contender in a round")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = RankReport("here", 0)
    measure_matmul_rates(report, device)
    rates = ", ".join(f"{report.facts[f'{name}_rate'] / 1e12:.3g} TFLOP/s in {name}" for name in ("fp32", "bf16"))
    text = (
        "# Training steps of foveal and its peers\n\n`python benchmarks/step.py --data FOLDER`: median milliseconds of a "
        f"step, and a peer's time over foveal's in {options.rounds} paired rounds, median (lowest-highest). As published: "
        "default products, default AdamW, fused attention, the loss read every step. Same switches: foveal's products, "
        "explicit attention where foveal has it, fused AdamW, the last loss read. The loss is the first one, from predictions of zero.\n\n"
        f"Machine: {described(['torch', 'timm', 'transformers', 'lightly'])}. Products of large matrices: {rates}.\n\n"
        + "".join(f"{line}\n" for line in PEER_HEADING)
    )
    for name in options.shapes:
        shape = SHAPES[name] if device.type == "cpu" else replace(SHAPES[name], batch=GPU_BATCH)
        for mode in options.modes:
            for row in compare(name, shape, mode, options, device):
                print(row, flush=True)
                text += f"{row}\n"
                if options.out:
                    options.out.write_text(text)
            gc.collect()


if __name__ == "__main__":
    main()
