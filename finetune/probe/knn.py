"""Nearest neighbours on kept features, exact: every distance is computed, in float64.

Uniform votes are scikit-learn's ``KNeighborsClassifier``; softmax votes with cosine similarities are DINO's protocol
(Caron et al., 2021). Of classes with as many votes the first wins, as there. Of neighbours at the same distance the first
in the order of the data is nearer; scikit-learn leaves that to its heap. Blocks are of fixed sizes, so that memory is
bounded and a query's distances do not depend on who else asks. Q queries, M images, k neighbours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Predictor, Resumable
from finetune.probe.plan import ProbePlan

_QUERY_BLOCK_SIZE, _IMAGE_BLOCK_SIZE = 512, 1 << 14  # of a block of distances: 64 MB


def fit_knn_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Nothing is learned: the images are kept, and each is asked."""
    yield
    return lambda part: _predict_classes(plan, train, part)


def _predict_classes(plan: ProbePlan, train: LayerFeatures, features: LayerFeatures) -> Resumable[Tensor]:
    """The winning class [number of k, Q] of every query."""
    probe, found = plan.probe, []
    for queries in _iter_blocks(features, _QUERY_BLOCK_SIZE):
        distances, positions = find_nearest_neighbors(
            queries, _iter_blocks(train, _IMAGE_BLOCK_SIZE), max(probe.k), probe.metric
        )
        votes = ((1 - distances) / probe.temperature).exp() if probe.vote == "softmax" else torch.ones_like(distances)
        found.append(majority_vote(votes, train.labels[positions], probe.k, len(plan.classes)))
        yield
    return torch.cat(found, dim=1)


def _iter_blocks(features: LayerFeatures, size: int) -> Iterator[Tensor]:
    """The features of a part, float64, so many images at once."""
    for start in range(0, len(features), size):
        yield features.load(slice(start, start + size)).double()


def find_nearest_neighbors(
    queries: Tensor, image_blocks: Iterator[Tensor], k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Distances and positions [Q, k] of the nearest of all images, the nearest first.

    ``blocks`` are the images in their order, [M, F] each, float64 as the queries [Q, F]. The distance is 1 - cosine, or
    the squared Euclidean one less the query's own square, which orders alike.
    """
    queries = _normalize_rows(queries) if metric == "cosine" else queries
    best = queries.new_empty(len(queries), 0)
    where = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    seen = 0
    for images in image_blocks:
        if metric == "cosine":
            distances = (1 - queries @ _normalize_rows(images).T).clamp(0, 2)
        else:
            distances = images.square().sum(dim=1) - 2 * (queries @ images.T)
        places = torch.arange(seen, seen + len(images), device=queries.device).expand(len(queries), -1)
        best, where = _k_smallest(torch.cat([best, distances], dim=1), torch.cat([where, places], dim=1), k)
        seen += len(images)
    order = best.argsort(dim=1, stable=True)
    return best.gather(1, order), where.gather(1, order)


def _k_smallest(distances: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, in the order that they came in; of equal ones the first."""
    if distances.shape[1] <= k:
        return distances, places
    limit = distances.kthvalue(k, dim=1, keepdim=True).values
    below, equal = distances < limit, distances == limit
    room = k - below.sum(dim=1, keepdim=True)
    taken = below | (equal & (equal.cumsum(dim=1) <= room))
    return distances[taken].view(-1, k), places[taken].view(-1, k)


def _normalize_rows(features: Tensor) -> Tensor:
    """Features over their length; one of length 0 stays, and is at distance 1 from all."""
    length = features.norm(dim=1, keepdim=True)
    return features / torch.where(length > 0, length, 1.0)


def majority_vote(votes: Tensor, labels: Tensor, ks: tuple[int, ...], num_classes: int) -> Tensor:
    """The class [len(ks), Q] with most votes of the first k neighbours, whose votes and labels are [Q, k].

    Votes are added from the nearest on, so that sums are the same on any device.
    """
    total = votes.new_zeros(len(votes), num_classes)
    after = {}
    for number, (vote, label) in enumerate(zip(votes.unbind(1), labels.unbind(1), strict=True), start=1):
        total.scatter_add_(1, label[:, None], vote[:, None])
        if number in ks:
            after[number] = total.argmax(dim=1)
    return torch.stack([after[k] for k in ks])
