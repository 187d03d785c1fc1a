"""Logistic regression on cached features, with the solution of scikit-learn's ``LogisticRegression(C=...)``.

The minimum of the mean cross-entropy plus |W|^2 / (2 C M), biases unpenalized, is unique: converged solvers agree on
it. This solver stops at 1/1000 of scikit-learn's default tolerance. M images, F feature dimensions, K classes.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Predictor, Resumable, predict_classes_per_head
from finetune.probe.plan import ProbePlan

GRADIENT_TOLERANCE = 1e-7  # on the largest entry of the gradient; scikit-learn's default is 1e-4
_CHUNK_SIZE = 1 << 14  # images whose float64 features and logits are in memory together
_ITERATIONS_PER_ROUND, _MAX_ROUNDS = 20, 100  # L-BFGS iterations between two yields, and the maximum of yields
_log = logging.getLogger("foveal.finetune")


def fit_logistic_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Fit multinomial logistic regression for each C on features standardised by the training images' statistics."""
    mean, scale = _feature_statistics(train)
    solutions = []
    for c in plan.probe.logistic_c:
        solution = yield from fit_logistic_regression(train, c, len(plan.classes), mean, scale)
        solutions.append(solution)
    weight_GKF, bias_GK = (torch.stack(tensors) for tensors in zip(*solutions, strict=True))

    def logits(features_BF: Tensor) -> Tensor:
        standardised = (features_BF.double() - mean) / scale
        return torch.einsum("bf,gkf->gbk", standardised, weight_GKF) + bias_GK[:, None]

    return lambda features: predict_classes_per_head(features, logits, plan.cfg.batch.max_micro_size)


def fit_logistic_regression(
    train: LayerFeatures, c: float, num_classes: int, mean: Tensor, scale: Tensor
) -> Resumable[tuple[Tensor, Tensor]]:
    """Return weights [K, F] and biases [K] for one C, float64, for features (x - ``mean`` [F]) / ``scale`` [F]."""
    width, device = train.all_images_memmap.shape[-1], train.labels.device
    theta = torch.zeros(num_classes, width + 1, dtype=torch.float64, device=device, requires_grad=True)
    # For two classes scikit-learn has one weight vector; two opposite vectors under twice the penalty are equivalent.
    strength = (2 if num_classes == 2 else 1) / (c * len(train))

    def compute_loss_and_grad() -> Tensor:
        with torch.no_grad():
            penalized = theta.clone()
            penalized[:, -1] = 0  # the biases
            loss, grad = 0.5 * strength * penalized.square().sum(), strength * penalized
            for rows, labels in _iter_chunks(train):
                ones = torch.ones(len(rows), 1, dtype=torch.float64, device=device)
                extended = torch.cat([(rows - mean) / scale, ones], dim=1)
                log_probs = (extended @ theta.T).log_softmax(dim=1)
                loss = loss + F.nll_loss(log_probs, labels, reduction="sum") / len(train)
                grad += (log_probs.exp() - F.one_hot(labels, num_classes)).T @ extended / len(train)
        theta.grad = grad
        return loss

    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=_ITERATIONS_PER_ROUND,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    for _ in range(_MAX_ROUNDS):
        optimizer.step(compute_loss_and_grad)
        compute_loss_and_grad()
        assert theta.grad is not None
        if float(theta.grad.abs().max()) <= GRADIENT_TOLERANCE:
            break
        yield
    else:
        _log.warning("logistic regression with C=%g has not converged", c)
    return theta.detach()[:, :-1], theta.detach()[:, -1]


def _iter_chunks(train: LayerFeatures) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features, float64, and labels in chunks of images."""
    for start in range(0, len(train), _CHUNK_SIZE):
        chunk = slice(start, start + _CHUNK_SIZE)
        yield train.load(chunk).double(), train.labels[chunk]


def _feature_statistics(train: LayerFeatures) -> tuple[Tensor, Tensor]:
    """Return mean [F] and standard deviation [F], which is 1 for a constant feature (scikit-learn's StandardScaler)."""
    mean = sum(rows.sum(dim=0) for rows, _ in _iter_chunks(train)) / len(train)
    variance = sum((rows - mean).square().sum(dim=0) for rows, _ in _iter_chunks(train)) / len(train)
    assert isinstance(mean, Tensor), "train has images"
    assert isinstance(variance, Tensor), "train has images"
    return mean, torch.where(variance > 0, variance.sqrt(), 1.0)
