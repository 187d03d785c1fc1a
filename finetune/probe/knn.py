"""The k-nearest-neighbour probe on cached features. Q queries, M images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Predictor, Resumable
from finetune.probe.plan import ProbePlan
from foveal.training.knn import IMAGE_BLOCK_SIZE, QUERY_BLOCK_SIZE, predict_knn_classes


def fit_knn_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Return the predictor; k nearest neighbours has no training."""
    yield
    return lambda features: _predict_classes(plan, train, features)


def _predict_classes(plan: ProbePlan, train: LayerFeatures, features: LayerFeatures) -> Resumable[Tensor]:
    """Return the class with the most votes for each k and query, int64 [len(probe.k), Q]."""
    probe, predictions = plan.probe, []
    for queries in _iter_blocks(features, QUERY_BLOCK_SIZE):
        predictions.append(
            predict_knn_classes(
                queries,
                _iter_blocks(train, IMAGE_BLOCK_SIZE),
                train.labels,
                probe.k,
                len(plan.classes),
                metric=probe.metric,
                vote=probe.vote,
                temperature=probe.temperature,
            )
        )
        yield
    return torch.cat(predictions, dim=1)


def _iter_blocks(features: LayerFeatures, size: int) -> Iterator[Tensor]:
    """Yield the features in blocks of ``size`` images, float64."""
    for start in range(0, len(features), size):
        yield features.load(slice(start, start + size)).double()
