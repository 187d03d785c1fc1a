"""How right a classifier is over a whole part of the data, exact on any number of ranks. B images, K classes."""

from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.plan import FinetunePlan
from finetune.regularizers.adversarial import Attack, build_attack
from finetune.tasks.classify import sum_batch_metrics
from foveal.data import Batch, normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.training.run import Run


def compute_classification_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """``top1``, ``top5`` in [0, 1] and ``loss`` after a step: every image counts once, padding nowhere.

    With adversarial training also ``robust_top1``, of images attacked as the settings say. Every rank calls it.
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
    images = max(images, 1.0)  # every sample may be bad, where data.max_bad says so
    found = {"top1": top1 / images, "top5": top5 / images, "loss": loss / images}
    return found if attack is None else found | {"robust_top1": robust / images}


def compute_multilabel_metrics(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> dict[str, float]:
    """Of several classes an image: ``map``, the mean over classes of the average precision (those that no image is of are
    left out), ``f1`` over all answers above a half (micro), and ``loss``, as ``accuracy``. Every rank calls it.

    Raises: DataError, on every rank, where no image is of any class.
    """
    from sklearn.metrics import average_precision_score  # takes a second

    plan = cast(FinetunePlan, run.plan)
    scores, truths, losses = [], [], torch.zeros(2, dtype=torch.float64, device=engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None
            logits_BK = engine.model(normalise(batch.images, plan.mean, plan.std)).float()[batch.valid]
            marks_BK = batch.targets[batch.valid]
            loss_BK = F.binary_cross_entropy_with_logits(logits_BK, marks_BK.float(), reduction="none")
            losses += torch.stack([loss_BK.mean(dim=1).double().sum(), batch.valid.double().sum()])
            scores.append(logits_BK.cpu().numpy())
            truths.append(marks_BK.cpu().numpy())
    none = np.zeros((0, len(plan.classes)), np.float32)
    told = run.world.all_gather_objects((np.concatenate([none, *scores]), np.concatenate([none, *truths])))
    score, truth = (np.concatenate(each) for each in zip(*told, strict=True))
    seen = truth.any(axis=0)
    if not seen.any():
        raise DataError(
            f"split '{split}' has no image of any class to measure by: set data.val to a split that has some"
        )
    mean = float(average_precision_score(truth[:, seen], score[:, seen]))
    right = float(((score > 0) * truth).sum())
    loss, images = run.world.all_reduce_sum(losses).tolist()
    f1 = 2 * right / max(1.0, float((score > 0).sum() + truth.sum()))
    return {"map": mean, "f1": f1, "loss": loss / max(images, 1.0)}


def _count_robust(engine: Engine, attack: Attack, images: Tensor, batch: Batch) -> Tensor:
    """How many of the batch's images are still seen right."""

    def loss(seen: Tensor) -> Tensor:
        return F.cross_entropy(engine.model(seen).float(), batch.labels, reduction="sum", ignore_index=-1)

    attacked = attack(loss, images, batch.sample_keys)
    return sum_batch_metrics(engine.model(attacked), batch.labels, batch.valid)[0]
