"""Exact k-nearest-neighbour classification of features: every distance is computed, in float64.

Uniform votes are scikit-learn's ``KNeighborsClassifier``; softmax votes with cosine similarities are the protocol of Wu
et al. (2018) and DINO (Caron et al., 2021). The first class wins a tied vote, as in both. The first image in the order
of the data wins a tied distance; scikit-learn leaves that to its heap. Blocks have fixed sizes, so that memory is
bounded and a query's distances do not depend on the other queries. Q queries, M images, F feature width, k neighbours.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

KnnMetric = Literal["cosine", "euclidean"]
KnnVote = Literal["uniform", "softmax"]
QUERY_BLOCK_SIZE, IMAGE_BLOCK_SIZE = 512, 1 << 14  # a block of distances is 64 MB


def predict_knn_classes(
    queries: Tensor,
    image_blocks: Iterable[Tensor],
    labels: Tensor,
    ks: tuple[int, ...],
    num_classes: int,
    *,
    metric: KnnMetric,
    vote: KnnVote,
    temperature: float,
) -> Tensor:
    """Return the class with the most votes for each k and query, int64 [len(ks), Q].

    ``queries`` [Q, F] and ``image_blocks`` as for ``find_nearest_neighbors``; ``labels`` [M] of the images. A softmax
    vote has the weight exp(similarity / temperature).
    """
    distances, positions = find_nearest_neighbors(queries, image_blocks, max(ks), metric)
    weights = ((1 - distances) / temperature).exp() if vote == "softmax" else torch.ones_like(distances)
    return majority_vote_per_k(weights, labels[positions], ks, num_classes)


def find_nearest_neighbors(
    queries: Tensor, image_blocks: Iterable[Tensor], k: int, metric: KnnMetric
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
