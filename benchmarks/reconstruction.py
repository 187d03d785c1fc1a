"""The README's picture: photographs, the patches that the encoder sees, and the reconstruction of a masked autoencoder.

    python benchmarks/reconstruction.py RUN docs/reconstruction.png

RUN is the run directory of a pretraining with target=pixels; its newest checkpoint is used. The photographs are the two
sample images of scikit-learn, which no training of foveal's configs has seen.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from foveal.checkpoint.chunk_index import load_chunks
from foveal.data.batch import Batch
from foveal.distributed.world import World
from foveal.engines.plain import PlainEngine
from foveal.inspect.reconstruction import draw_reconstruction_grid
from pretrain.config import PretrainConfig
from pretrain.plan import plan_pretraining
from pretrain.train import build

CROPS = ((0, 90), (0, 200), (1, 60), (1, 160))  # photograph and left edge of a square of its height
COLUMNS = 2  # of image triples
GAP = 12  # pixels between two columns of triples


def sample_crops(side: int) -> Tensor:
    """Return square crops of the sample photographs, uint8 [B, 3, side, side]."""
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    crops = []
    for number, left in CROPS:
        photograph = photographs[number]
        box = (left, 0, left + photograph.height, photograph.height)
        crop = photograph.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        crops.append(
            torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
        )
    return torch.stack(crops)


def batch_of(images: Tensor) -> Batch:
    """Return a batch of these images with masks of their own."""
    ids = torch.arange(len(images))
    return Batch(images, torch.full_like(ids, -1), ids, ids, ids >= 0, step=0, epoch=0, microbatch_index=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a pretraining")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    cfg = PretrainConfig.load(options.run / "config.yaml", ())
    plan = plan_pretraining(cfg, 1)
    world = World(0, 1, 0, "none", torch.device("cpu"))
    setup = build(plan, world.device)
    engine = PlainEngine(setup.model, setup.param_groups, cfg.optim, cfg.engine, world, 1)
    checkpoint = max((options.run / "checkpoints").glob("step-*"))
    load_chunks(checkpoint, engine.state_chunks())
    side = cfg.data.image_size
    assert isinstance(side, int), "the sample photographs are cut to squares"
    images, objective = sample_crops(side), setup.objective
    with engine.eval_mode():
        _, output = objective.predict(engine.model, batch_of(images))
    grids = [
        draw_reconstruction_grid(
            images[rows],
            output.masked_patch_pred[rows],
            output.masked_indices[rows],
            mean=plan.mean,
            std=plan.std,
            norm_pix=cfg.norm_pix,
        )
        for rows in torch.arange(len(images)).chunk(COLUMNS)
    ]
    page = Image.new("RGB", (sum(grid.width for grid in grids) + GAP * (COLUMNS - 1), grids[0].height), "white")
    left = 0
    for grid in grids:
        page.paste(grid, (left, 0))
        left += grid.width + GAP
    page.save(options.picture, optimize=True)
    print(f"{options.picture}: {checkpoint.name} of {options.run}")


if __name__ == "__main__":
    main()
