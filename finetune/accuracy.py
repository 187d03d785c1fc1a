"""Top-1 and top-5 over a whole part of the data, exact on any number of ranks."""

import torch

from finetune.config import FinetunePlan
from finetune.objective import hits
from foveal.data import eval_batches, normalise
from foveal.data.subset import PartName
from foveal.distributed.engine import Engine
from foveal.distributed.world import World


def accuracy(engine: Engine, plan: FinetunePlan, world: World, *, split: str, part: PartName) -> dict[str, float]:
    """``top1``, ``top5`` in [0, 1] and ``loss``: every image counts once, padding nowhere. Every rank calls it."""
    cfg = plan.cfg
    counts = torch.zeros(4, dtype=torch.float64, device=engine.device)
    batches = eval_batches(
        plan.dataset,
        cfg.data,
        split=split,
        part=part,
        seed=cfg.seed,
        rank=world.rank,
        size=world.size,
        at_once=cfg.batch.at_once,
    )
    with engine.looking():
        for host_batch in batches:
            batch = host_batch.to(engine.device)
            logits_BK = engine.model(normalise(batch.images, plan.mean, plan.std))
            counts += hits(logits_BK, batch.labels, batch.valid)
    top1, top5, loss, images = world.sum(counts).tolist()
    return {"top1": top1 / images, "top5": top5 / images, "loss": loss / images}
