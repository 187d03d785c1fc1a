"""Top-1 and top-5 over a whole part of the data, exact on any number of ranks."""

import torch

from finetune.objective import NUMBERS, hits
from foveal.data import normalise
from foveal.data.subset import PartName
from foveal.distributed.engine import Engine
from foveal.runtime import Run


def accuracy(engine: Engine, run: Run, step: int, *, split: str, part: PartName) -> dict[str, float]:
    """``top1``, ``top5`` in [0, 1] and ``loss`` after a step: every image counts once, padding nowhere.

    Every rank calls it.
    """
    plan = run.plan
    counts = torch.zeros(4, dtype=torch.float64, device=engine.device)
    with engine.looking():
        for host_batch in run.evaluation(step, split=split, part=part):
            batch = host_batch.to(engine.device)
            logits_BK = engine.model(normalise(batch.images, plan.mean, plan.std))
            counts += hits(logits_BK, batch.labels, batch.valid)
    top1, top5, loss, images = run.world.sum(counts).tolist()
    images = max(images, 1.0)  # every sample may be bad, where data.max_bad says so
    return {name: total / images for name, total in zip(NUMBERS, (top1, top5, loss), strict=True)}
