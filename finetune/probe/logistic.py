"""Logistic regression on kept features, the same that scikit-learn's ``LogisticRegression(C=...)`` finds.

The minimum of the mean cross-entropy plus |W|^2 / (2 C M), biases free, is one point: two solvers that go far enough
agree on it. This one stops at a thousandth of scikit-learn's default tolerance. M images, F numbers, K classes.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Predictor, Resumable, predict_classes
from finetune.probe.plan import ProbePlan

GRADIENT_TOLERANCE = 1e-7  # on the largest entry of the gradient; scikit-learn's default is 1e-4
_CHUNK_SIZE = 1 << 14  # images whose float64 features and logits are there at once
_ITERATIONS_PER_ROUND, _MAX_ROUNDS = 20, 100  # of L-BFGS between two breaths, and the most breaths
_log = logging.getLogger("foveal.finetune")


def fit_logistic_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """For each C: multinomial logistic regression on features that are standardised by the training images."""
    mean, scale = _feature_statistics(train)
    fitted = []
    for c in plan.probe.logistic_c:
        found = yield from fit_logistic_regression(train, c, len(plan.classes), mean, scale)
        fitted.append(found)
    weight_GKF, bias_GK = (torch.stack(each) for each in zip(*fitted, strict=True))

    def logits(features_BF: Tensor) -> Tensor:
        standard = (features_BF.double() - mean) / scale
        return torch.einsum("bf,gkf->gbk", standard, weight_GKF) + bias_GK[:, None]

    return lambda part: predict_classes(part, logits, plan.cfg.batch.at_once)


def fit_logistic_regression(
    train: LayerFeatures, c: float, num_classes: int, mean: Tensor, scale: Tensor
) -> Resumable[tuple[Tensor, Tensor]]:
    """Weights [K, F] and biases [K] of one C, float64, for features less ``mean`` [F] over ``scale`` [F]."""
    width, device = train.memmap.shape[-1], train.labels.device
    theta = torch.zeros(num_classes, width + 1, dtype=torch.float64, device=device, requires_grad=True)
    # scikit-learn has one weight for two classes; two that are opposite, under twice the penalty, are the same.
    strength = (2 if num_classes == 2 else 1) / (c * len(train))

    def slope() -> Tensor:
        with torch.no_grad():
            free = theta.clone()
            free[:, -1] = 0
            value, found = 0.5 * strength * free.square().sum(), strength * free
            for rows, labels in _iter_chunks(train):
                ones = torch.ones(len(rows), 1, dtype=torch.float64, device=device)
                extended = torch.cat([(rows - mean) / scale, ones], dim=1)
                logs = (extended @ theta.T).log_softmax(dim=1)
                value = value + F.nll_loss(logs, labels, reduction="sum") / len(train)
                found += (logs.exp() - F.one_hot(labels, num_classes)).T @ extended / len(train)
        theta.grad = found
        return value

    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=_ITERATIONS_PER_ROUND,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    for _ in range(_MAX_ROUNDS):
        optimizer.step(slope)
        slope()
        assert theta.grad is not None
        if float(theta.grad.abs().max()) <= GRADIENT_TOLERANCE:
            break
        yield
    else:
        _log.warning("logistic regression with C=%g has not come to its minimum", c)
    return theta.detach()[:, :-1], theta.detach()[:, -1]


def _iter_chunks(train: LayerFeatures) -> Iterator[tuple[Tensor, Tensor]]:
    """Features, float64, and labels of the images, some at once."""
    for start in range(0, len(train), _CHUNK_SIZE):
        part = slice(start, start + _CHUNK_SIZE)
        yield train.load(part).double(), train.labels[part]


def _feature_statistics(train: LayerFeatures) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every number [F], a constant one's deviation being 1, as scikit-learn's StandardScaler has it."""
    mean = sum(rows.sum(dim=0) for rows, _ in _iter_chunks(train)) / len(train)
    variance = sum((rows - mean).square().sum(dim=0) for rows, _ in _iter_chunks(train)) / len(train)
    assert isinstance(mean, Tensor), "a part has images"
    assert isinstance(variance, Tensor), "a part has images"
    return mean, torch.where(variance > 0, variance.sqrt(), 1.0)
