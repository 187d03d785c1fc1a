"""Image classification with several classes per image: a binary classifier for each of K classes. B images."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.config import FinetuneConfig
from finetune.evaluation_details import EvaluationDetails
from finetune.task import FinetunePlan
from finetune.tasks.classify import Classification, ClassificationLoss, is_largest_target
from finetune.tasks.multilabel_details import MultiLabelDetails
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.class_lists import MultiLabelReader
from foveal.data.image.targets import LabelReader, require_class_names, resolve_label_field
from foveal.data.image.transforms import normalise
from foveal.data.sampling.subset import SubsetName
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.training.evaluations import Metric
from foveal.training.run import Run


@dataclass(frozen=True)
class MultiLabelLoss(ClassificationLoss):
    """Mean binary cross-entropy over the classes, weighted by ``class_weights`` [K]."""

    def batch_weight(self, batch: Batch) -> Tensor:
        """Return the number of images."""
        return (batch.ids >= 0).sum()

    def compute_targets(self, batch: Batch) -> Tensor:
        """Return multi-hot targets [B, K], smoothed towards 1/2."""
        assert batch.targets is not None, "task=multilabel reads targets"
        smoothing = self.cfg.label_smoothing
        return (1 - smoothing) * batch.targets.float() + smoothing / 2

    def compute_loss_terms(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the terms [B, K] whose sum over classes is the mean binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none") / logits_BK.shape[1]

    def sum_correct(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Return the number of images whose most probable class is one of theirs."""
        return is_largest_target(logits_BK.argmax(dim=1, keepdim=True), targets_BK).sum()


class MultiLabelClassification(Classification):
    """Several classes per image, as a list in a .json member."""

    name = "multilabel"
    min_classes = 1
    has_index_labels = False
    supported_settings = (Classification.supported_settings | {"data.label_field"}) - {
        "teacher",
        "adversarial",
        "probe",
        "data.fold",
    }
    loss_class = MultiLabelLoss

    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader:
        field = resolve_label_field(cfg, dataset, "json", self.name)
        return MultiLabelReader(field, require_class_names(dataset), allows_repeats=cfg.decode_version == 1)

    def compute_scores(self, logits_BK: Tensor) -> Tensor:
        """Return the probability of each class by itself, [B, K]: sigmoid."""
        return logits_BK.float().sigmoid()

    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        return (
            Metric("mAP", higher_is_better=True),
            Metric("f1", higher_is_better=True),
            Metric("loss", higher_is_better=False),
        )

    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        return compute_multilabel_metrics_and_details(engine, run, step, split=split, subset=subset)[0]

    def compute_metrics_and_details(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> tuple[dict[str, float], EvaluationDetails | None]:
        return compute_multilabel_metrics_and_details(engine, run, step, split=split, subset=subset)


def compute_multilabel_metrics_and_details(
    engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
) -> tuple[dict[str, float], MultiLabelDetails]:
    """Return ``mAP``, ``f1`` and ``loss`` of multi-label classification after a step. Every rank must call it.

    ``mAP``: mean average precision over the classes that occur. ``f1``: micro-averaged F1 at probability 1/2.
    Raises: DataError, on every rank, if no image has a class.
    """
    from sklearn.metrics import average_precision_score  # the import takes a second

    plan = cast(FinetunePlan, run.plan)
    ids, scores, truths, losses = [], [], [], torch.zeros(2, dtype=torch.float64, device=engine.device)
    with engine.eval_mode():
        for host_batch in run.evaluation_batches(step, split=split, subset=subset):
            batch = host_batch.to(engine.device)
            assert batch.targets is not None
            logits_BK = engine.model(normalise(batch.images, plan.mean, plan.std)).float()[batch.valid]
            targets_BK = batch.targets[batch.valid]
            loss_BK = F.binary_cross_entropy_with_logits(logits_BK, targets_BK.float(), reduction="none")
            losses += torch.stack([loss_BK.mean(dim=1).double().sum(), batch.valid.double().sum()])
            ids.append(host_batch.ids[host_batch.valid].numpy())
            scores.append(logits_BK.cpu().numpy())
            truths.append(targets_BK.cpu().numpy())
    empty = np.zeros((0, len(plan.classes)), np.float32)  # a rank may have no batch
    gathered = run.world.all_gather_objects(
        (
            np.concatenate([np.zeros(0, np.int64), *ids]),
            np.concatenate([empty, *scores]),
            np.concatenate([empty, *truths]),
        )
    )
    sample_ids, score, truth = (np.concatenate(arrays) for arrays in zip(*gathered, strict=True))
    occurring = truth.any(axis=0)
    if not occurring.any():
        raise DataError(
            f"split '{split}' has no image of any class to measure by: set data.val to a split that has some"
        )
    mean_precision = float(average_precision_score(truth[:, occurring], score[:, occurring]))
    true_positives = float(((score > 0) * truth).sum())
    loss, images = run.world.all_reduce_sum(losses).tolist()
    f1 = 2 * true_positives / max(1.0, float((score > 0).sum() + truth.sum()))
    metrics = {"mAP": mean_precision, "f1": f1, "loss": loss / max(images, 1.0)}
    return metrics, MultiLabelDetails(plan.classes, sample_ids, score, truth)
