"""Exact k-nearest-neighbour classification on cached features: every distance is computed, in float64.

Uniform votes are scikit-learn's ``KNeighborsClassifier``; softmax votes with cosine similarities are DINO's protocol
(Caron et al., 2021). The first class wins a tied vote, as in both. The first image in the order of the data wins a tied
distance; scikit-learn leaves that to its heap. Blocks have fixed sizes, so that memory is bounded and a query's
distances do not depend on the other queries. Q queries, M images, k neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Predictor, Resumable
from finetune.probe.plan import ProbePlan

_QUERY_BLOCK_SIZE, _IMAGE_BLOCK_SIZE = 512, 1 << 14  # a block of distances is 64 MB


def fit_knn_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Return the predictor; k nearest neighbours has no training."""
    yield
    return lambda features: _predict_classes(plan, train, features)


def _predict_classes(plan: ProbePlan, train: LayerFeatures, features: LayerFeatures) -> Resumable[Tensor]:
    """Return the class with the most votes for each k and query, int64 [len(probe.k), Q]."""
    probe, predictions = plan.probe, []
    for queries in _iter_blocks(features, _QUERY_BLOCK_SIZE):
        distances, positions = find_nearest_neighbors(
            queries, _iter_blocks(train, _IMAGE_BLOCK_SIZE), max(probe.k), probe.metric
        )
        votes = ((1 - distances) / probe.temperature).exp() if probe.vote == "softmax" else torch.ones_like(distances)
        predictions.append(majority_vote_per_k(votes, train.labels[positions], probe.k, len(plan.classes)))
        yield
    return torch.cat(predictions, dim=1)


def _iter_blocks(features: LayerFeatures, size: int) -> Iterator[Tensor]:
    """Yield the features in blocks of ``size`` images, float64."""
    for start in range(0, len(features), size):
        yield features.load(slice(start, start + size)).double()


def find_nearest_neighbors(
    queries: Tensor, image_blocks: Iterator[Tensor], k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Return distances and positions [Q, k] of the nearest of all images, nearest first.

    ``image_blocks`` yields the images in order, [M, F] per block, float64 as the queries [Q, F]. The distance is
    1 - cosine, or the squared Euclidean distance minus the query's squared norm, which has the same order.
    """
    queries = _normalize_rows(queries) if metric == "cosine" else queries
    nearest = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for images in image_blocks:
        if metric == "cosine":
            distances = (1 - queries @ _normalize_rows(images).T).clamp(0, 2)
        else:
            distances = images.square().sum(dim=1) - 2 * (queries @ images.T)
        block = torch.arange(first, first + len(images), device=queries.device).expand(len(queries), -1)
        nearest, positions = _k_smallest(
            torch.cat([nearest, distances], dim=1), torch.cat([positions, block], dim=1), k
        )
        first += len(images)
    order = nearest.argsort(dim=1, stable=True)
    return nearest.gather(1, order), positions.gather(1, order)


def _k_smallest(distances: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest distances of each row and their positions, in input order; the first of equal ones win."""
    if distances.shape[1] <= k:
        return distances, positions
    limit = distances.kthvalue(k, dim=1, keepdim=True).values
    below, equal = distances < limit, distances == limit
    num_equal = k - below.sum(dim=1, keepdim=True)
    selected = below | (equal & (equal.cumsum(dim=1) <= num_equal))
    return distances[selected].view(-1, k), positions[selected].view(-1, k)


def _normalize_rows(features: Tensor) -> Tensor:
    """Return features of norm 1; a zero feature stays zero, at distance 1 from all."""
    norm = features.norm(dim=1, keepdim=True)
    return features / torch.where(norm > 0, norm, 1.0)


def majority_vote_per_k(vote_weights: Tensor, labels: Tensor, ks: tuple[int, ...], num_classes: int) -> Tensor:
    """Return the class [len(ks), Q] with most votes among the first k neighbours; votes and labels are [Q, max(ks)].

    Votes are added from the nearest neighbour on, so that sums are the same on any device.
    """
    total = vote_weights.new_zeros(len(vote_weights), num_classes)
    winners = {}
    for rank, (vote, label) in enumerate(zip(vote_weights.unbind(1), labels.unbind(1), strict=True), start=1):
        total.scatter_add_(1, label[:, None], vote[:, None])
        if rank in ks:
            winners[rank] = total.argmax(dim=1)
    return torch.stack([winners[k] for k in ks])
