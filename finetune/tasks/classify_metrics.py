"""Metrics of classifiers on a data subset, exact on any number of ranks. B images, K classes."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.regularizers.adversarial import Attack, build_attack
from finetune.task import FinetunePlan
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.training.run import Run

UNLABELLED = -1


def compute_classification_metrics(
    engine: Engine,
    run: Run,
    step: int,
    *,
    split: str,
    subset: SubsetName,
    observe: Callable[[Tensor, Batch], None] | None = None,
) -> dict[str, float]:
    """Return ``top1`` and ``top5`` in [0, 1] and ``loss`` after a step; each image counts once, padding is excluded.

    With ``adversarial`` also ``robust_top1``, the top-1 on attacked images. ``observe`` gets the logits [B, K] of every
    batch, and the batch on the device. Every rank must call it.
    """
    plan = cast(FinetunePlan, run.plan)
    attack = build_attack(plan)
    counts = torch.zeros(5, dtype=torch.float64, device=engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            images = normalise(batch.images, plan.mean, plan.std)
            logits_BK = engine.model(images)
            counts[:4] += sum_batch_metrics(logits_BK, batch.labels, batch.valid)
            if observe is not None:
                observe(logits_BK, batch)
            if attack is not None:
                counts[4] += _count_robust(engine, attack, images, batch)
    top1, top5, loss, images, robust = run.world.all_reduce_sum(counts).tolist()
    images = max(images, 1.0)  # data.max_bad_fraction may allow that no sample decodes
    metrics = {"top1": top1 / images, "top5": top5 / images, "loss": loss / images}
    return metrics if attack is None else metrics | {"robust_top1": robust / images}


@torch.no_grad()
def sum_batch_metrics(logits_BK: Tensor, labels_B: Tensor, valid_B: Tensor) -> Tensor:
    """Return sums over labelled images, float64 [4]: top-1 correct, top-5 correct, cross-entropy, images."""
    labelled_B = valid_B & (labels_B != UNLABELLED)
    predictions_B5 = predict_classes(logits_BK)
    correct_B5 = (predictions_B5 == labels_B[:, None]) & labelled_B[:, None]
    losses_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", ignore_index=UNLABELLED) * labelled_B
    return torch.stack([correct_B5[:, 0].sum(), correct_B5.sum(), losses_B.double().sum(), labelled_B.sum()]).double()


def predict_classes(logits_BK: Tensor) -> Tensor:
    """Return the most probable classes, at most 5, most probable first, int64 [B, 5]."""
    return logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices


def _count_robust(engine: Engine, attack: Attack, images: Tensor, batch: Batch) -> Tensor:
    """Return the number of attacked images that are classified correctly."""

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(engine.model(images).float(), batch.labels, reduction="sum", ignore_index=UNLABELLED)

    attacked = attack(loss, images, batch.sample_keys)
    return sum_batch_metrics(engine.model(attacked), batch.labels, batch.valid)[0]
