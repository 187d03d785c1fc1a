"""Images per second and peak memory of `foveal embed` on one rank and on two.

    python benchmarks/embed.py --images FOLDER [--export EXPORT] [--device auto] [--out FILE.md]

FOLDER: images or shards, such as CIFAR-10's after unpack.sh of the test data. Without --export a ViT-S/16 of random
weights is made, for images of 224 pixels, or with --patch 4 --size 32 one for CIFAR-10: speed does not depend on weights.
Each case is a process of its own, which imports, reads the list, computes and writes; seconds are of all that, and of the
features alone, from the time between the manifest and the last shard. Memory is the highest resident size of a rank.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import described

from foveal.inference.embedding_files import MANIFEST, read_manifest
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.weights.export import Card, write_export

_RANK = "--as-rank"  # an own process: measures itself and says so in a file
_PACKAGES = ("foveal", "torch", "timm", "Pillow", "simplejpeg", "pyarrow")


def make_export(folder: Path, size: int, patch: int) -> Path:
    """A ViT-S of random weights."""
    cfg = VitConfig(name="vit_small_patch16_224", patch=patch)
    torch.manual_seed(0)
    encoder = build_encoder(cfg, image_size=size, channels=3)
    card = Card("pretrain", encoder_card(cfg, size, 3), (0.5,) * 3, (0.25,) * 3)
    write_export(folder, encoder.state_dict(), card)
    return folder


def run_as_rank(report: Path, arguments: list[str]) -> None:
    """Run the command in this process and write its peak memory in bytes."""
    from foveal.cli import app

    try:
        app(["embed", *arguments], standalone_mode=False)
    finally:
        peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
        (report / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak))


def measure(ranks: int, export: Path, images: str, options: list[str]) -> dict[str, float]:
    """Embed all images once."""
    with tempfile.TemporaryDirectory() as folder:
        out, report = Path(folder, "out"), Path(folder, "report")
        report.mkdir()
        arguments = [_RANK, str(report), str(export), images, "--out", str(out), *options]
        launcher = (
            [sys.executable]
            if ranks == 1
            else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        )
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
        subprocess.run([*launcher, __file__, *arguments], env=os.environ | threads, check=True, capture_output=True)
        manifest = read_manifest(out)
        shards = [manifest.shard_file(out, number).stat().st_mtime for number in range(manifest.num_shards)]
        seconds = max(shards) - (out / MANIFEST).stat().st_mtime
        peaks = [json.loads(file.read_text()) for file in report.iterdir()]
        row = {"images": manifest.images, "per_second": manifest.images / seconds}
        return row | {name: max(peak[name] for peak in peaks) / 1e9 for name in peaks[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--size", type=int, default=224, help="pixels, of the model that is made")
    parser.add_argument("--patch", type=int, default=16, help="pixels, of the model that is made")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", default="64")
    parser.add_argument("--shard-size", default="1000", help="images, so that ranks end at about the same time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = options.export or make_export(Path(folder, "export"), options.size, options.patch)
        command = ["--device", options.device, "--batch-size", options.batch_size, "--shard-size", options.shard_size]
        rows: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(options.repeats):  # interleaved: what else the machine does meets both
            for ranks, measured in rows.items():
                measured.append(measure(ranks, export, options.images, command))
    model = str(options.export or f"ViT-S/{options.patch} at {options.size} pixels, random weights")
    lines = ["# Features per second", "", described(_PACKAGES), "", f"`python {' '.join(sys.argv)}`: {model}.", ""]
    lines += ["| ranks | images | images/s, median | lowest | highest | peak memory of a rank, GB | of its GPU, GB |"]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|"]
    for ranks, measured in rows.items():
        rates = [row["per_second"] for row in measured]
        spread = " | ".join(f"{value:,.0f}" for value in (statistics.median(rates), min(rates), max(rates)))
        peaks = [max(row.get(name, 0.0) for row in measured) for name in ("resident", "gpu")]
        lines.append(f"| {ranks} | {measured[0]['images']:,.0f} | {spread} | {peaks[0]:.2f} | {peaks[1]:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == [_RANK]:
        run_as_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
