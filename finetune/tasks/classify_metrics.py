"""Metrics of classifiers on a data subset, exact on any number of ranks. B images, K classes."""

from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.plan import FinetunePlan
from finetune.regularizers.adversarial import Attack, build_attack
from finetune.tasks.classify import sum_batch_metrics
from foveal.data.batch import Batch
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.training.run import Run


def compute_classification_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """Return ``top1`` and ``top5`` in [0, 1] and ``loss`` after a step; each image counts once, padding is excluded.

    With ``adversarial`` also ``robust_top1``, the top-1 on attacked images. Every rank must call it.
    """
    plan = cast(FinetunePlan, run.plan)
    attack = build_attack(plan)
    counts = torch.zeros(5, dtype=torch.float64, device=engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            images = normalise(batch.images, plan.mean, plan.std)
            counts[:4] += sum_batch_metrics(engine.model(images), batch.labels, batch.valid)
            if attack is not None:
                counts[4] += _count_robust(engine, attack, images, batch)
    top1, top5, loss, images, robust = run.world.all_reduce_sum(counts).tolist()
    images = max(images, 1.0)  # data.max_bad_fraction may allow that no sample decodes
    metrics = {"top1": top1 / images, "top5": top5 / images, "loss": loss / images}
    return metrics if attack is None else metrics | {"robust_top1": robust / images}


def compute_multilabel_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """Return ``map``, ``f1`` and ``loss`` of multi-label classification after a step. Every rank must call it.

    ``map``: mean average precision over the classes that occur. ``f1``: micro-averaged F1 at probability 1/2.
    Raises: DataError, on every rank, if no image has a class.
    """
    from sklearn.metrics import average_precision_score  # the import takes a second

    plan = cast(FinetunePlan, run.plan)
    scores, truths, losses = [], [], torch.zeros(2, dtype=torch.float64, device=engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None
            logits_BK = engine.model(normalise(batch.images, plan.mean, plan.std)).float()[batch.valid]
            targets_BK = batch.targets[batch.valid]
            loss_BK = F.binary_cross_entropy_with_logits(logits_BK, targets_BK.float(), reduction="none")
            losses += torch.stack([loss_BK.mean(dim=1).double().sum(), batch.valid.double().sum()])
            scores.append(logits_BK.cpu().numpy())
            truths.append(targets_BK.cpu().numpy())
    empty = np.zeros((0, len(plan.classes)), np.float32)  # a rank may have no batch
    gathered = run.world.all_gather_objects((np.concatenate([empty, *scores]), np.concatenate([empty, *truths])))
    score, truth = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
    occurring = truth.any(axis=0)
    if not occurring.any():
        raise DataError(
            f"split '{split}' has no image of any class to measure by: set data.val to a split that has some"
        )
    mean_precision = float(average_precision_score(truth[:, occurring], score[:, occurring]))
    true_positives = float(((score > 0) * truth).sum())
    loss, images = run.world.all_reduce_sum(losses).tolist()
    f1 = 2 * true_positives / max(1.0, float((score > 0).sum() + truth.sum()))
    return {"map": mean_precision, "f1": f1, "loss": loss / max(images, 1.0)}


def _count_robust(engine: Engine, attack: Attack, images: Tensor, batch: Batch) -> Tensor:
    """Return the number of attacked images that are classified correctly."""

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(engine.model(images).float(), batch.labels, reduction="sum", ignore_index=-1)

    attacked = attack(loss, images, batch.sample_keys)
    return sum_batch_metrics(engine.model(attacked), batch.labels, batch.valid)[0]
