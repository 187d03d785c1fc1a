"""Probes against references: LARS against timm's, logistic regression and neighbours against scikit-learn's."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import KNeighborsClassifier
from timm.optim.lars import Lars
from torch import Tensor

from finetune.probe.config import ProbeConfig
from finetune.probe.features import LayerFeatures
from finetune.probe.heads import Resumable, fit_linear_probe, lars_step, momentum_step
from finetune.probe.knn import _iter_blocks, find_nearest_neighbors, fit_knn_probe
from finetune.probe.logistic import fit_logistic_probe, fit_logistic_regression

_DIGITS: Any = load_digits()
PIXELS: np.ndarray = _DIGITS.data
LABELS: np.ndarray = _DIGITS.target
TRAIN, VAL = slice(0, 1000), slice(1000, 1500)


def labelled_features(rows: slice, features: np.ndarray = PIXELS) -> LayerFeatures:
    labels = torch.from_numpy(LABELS[rows])
    return LayerFeatures(features[rows].astype(np.float32), np.arange(len(labels)), labels)


def plan(classes: int = 10, epochs: int = 3, images: int = 128, **probe: Any) -> Any:
    """Return a stand-in with the fields of a plan that the probes read."""
    optim = SimpleNamespace(min_lr=0.0, warmup_epochs=1)
    batch = SimpleNamespace(images=images, max_micro_size=64)
    cfg = SimpleNamespace(seed=1, epochs=epochs, batch=batch, optim=optim)
    return SimpleNamespace(cfg=cfg, probe=ProbeConfig(**probe), classes=tuple(map(str, range(classes))))


def run_to_end(work: Resumable) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def fit_and_predict(fit: Any, plan: Any, train: LayerFeatures, val: LayerFeatures) -> np.ndarray:
    return run_to_end(run_to_end(fit(plan, train))(val)).numpy()


def test_lars_is_timms_for_every_rate_at_once() -> None:
    torch.manual_seed(0)
    rates, random_init = [0.1, 3.0], [torch.randn(10, 64) * 0.01, torch.zeros(10)]
    zeros = [torch.zeros(10, 64), torch.zeros(10)]  # norm 0: the trust ratio is 1
    gradients = [[torch.randn(10, 64), torch.randn(10)] for _ in range(4)]
    for initial in (random_init, zeros):
        weight, bias = (tensor.repeat(2, *[1] * tensor.ndim) for tensor in initial)
        moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for gradient in gradients:
            lars_step(weight, gradient[0].expand_as(weight), moments[0], torch.tensor(rates))
            momentum_step(bias, gradient[1].expand_as(bias), moments[1], torch.tensor(rates))
        for number, rate in enumerate(rates):
            parameters = [torch.nn.Parameter(tensor.clone()) for tensor in initial]
            groups = [
                {"params": [parameters[0]], "always_adapt": True},
                {"params": [parameters[1]], "always_adapt": False},
            ]
            optimizer = cast(Any, Lars)(groups, lr=rate, momentum=0.9, weight_decay=0.0)
            for gradient in gradients:
                parameters[0].grad, parameters[1].grad = gradient[0].clone(), gradient[1].clone()
                optimizer.step()
            torch.testing.assert_close(weight[number], parameters[0].detach(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(bias[number], parameters[1].detach(), rtol=1e-5, atol=1e-7)


def test_a_head_does_not_depend_on_the_others_of_the_sweep() -> None:
    train, val = labelled_features(TRAIN), labelled_features(VAL)
    swept = fit_and_predict(fit_linear_probe, plan(linear_lr_per_256=(0.1, 3.0)), train, val)
    for number, rate in enumerate((0.1, 3.0)):
        assert (
            fit_and_predict(fit_linear_probe, plan(linear_lr_per_256=(rate,)), train, val)[0] == swept[number]
        ).mean() > 0.998
    repeated = fit_and_predict(fit_linear_probe, plan(linear_lr_per_256=(0.1, 3.0)), train, val)
    assert (repeated == swept).all()
    assert (swept[0] != swept[1]).any()


@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize("classes", [10, 2])
def test_logistic_regression_is_scikit_learns(c: float, classes: int) -> None:
    selected = np.isin(LABELS, range(classes))
    rows = (PIXELS[selected] / 16).astype(np.float32)
    labels = LABELS[selected]
    train = LayerFeatures(rows, np.arange(len(labels)), torch.from_numpy(labels))
    zeros, ones = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    weight, bias = run_to_end(fit_logistic_regression(train, c, classes, zeros, ones))
    sklearn_model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(rows.astype(np.float64), labels)
    solution = torch.cat([weight, bias[:, None]], dim=1)
    expected = np.concatenate([sklearn_model.coef_, sklearn_model.intercept_[:, None]], axis=1)
    if classes == 2:  # scikit-learn has one weight vector, the difference of the two here
        difference = (solution[1] - solution[0]).numpy()
        np.testing.assert_allclose(difference, expected[0], atol=2e-4)
    else:
        # A shift common to all classes changes no prediction, and that of the biases is not penalized.
        centred = (solution - solution.mean(dim=0)).numpy()
        np.testing.assert_allclose(centred, expected - expected.mean(axis=0), atol=2e-4 * np.abs(expected).max())
    assert (predict_linear(weight, bias, rows) == sklearn_model.predict(rows.astype(np.float64))).all()


def predict_linear(weight: Tensor, bias: Tensor, rows: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(rows).double() @ weight.T + bias).argmax(dim=1).numpy()


def test_the_linear_probe_agrees_with_scikit_learn_at_its_default_tolerance() -> None:
    """On the same standardised features: ``logistic`` prediction by prediction, ``linear`` by accuracy."""
    train, val = labelled_features(TRAIN), labelled_features(VAL)
    mean, scale = PIXELS[TRAIN].mean(axis=0), PIXELS[TRAIN].std(axis=0)
    rows = (PIXELS - mean) / np.where(scale > 0, scale, 1)
    sklearn_model = LogisticRegression(C=0.1, max_iter=1000).fit(rows[TRAIN], LABELS[TRAIN])
    predictions = fit_and_predict(fit_logistic_probe, plan(logistic_c=(0.1,)), train, val)[0]
    assert (predictions == sklearn_model.predict(rows[VAL])).mean() > 0.995
    by_steps = fit_and_predict(fit_linear_probe, plan(epochs=60, linear_lr_per_256=(20.0,)), train, val)[0]
    score = sklearn_model.score(rows[VAL], LABELS[VAL])
    assert (by_steps == LABELS[VAL]).mean() == pytest.approx(score, abs=0.02)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("features", ["pixels", "coarse", "twice"])
def test_neighbours_are_scikit_learns(metric: str, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse pixels and repeated images give many tied distances and votes."""
    monkeypatch.setattr("finetune.probe.knn._IMAGE_BLOCK_SIZE", 300)
    monkeypatch.setattr("finetune.probe.knn._QUERY_BLOCK_SIZE", 190)
    rows = {"pixels": PIXELS, "coarse": np.round(PIXELS / 8), "twice": np.concatenate([PIXELS[:500]] * 3)}[features]
    train, val, ks = labelled_features(TRAIN, rows), labelled_features(slice(1000, 1400), rows), (1, 2, 5, 8)
    if features == "twice":
        ks = (2, 8)
        # The same image gets two labels.
        train = LayerFeatures(train.all_images_memmap, train.labelled_indices, torch.from_numpy(LABELS[TRAIN]))
    predictions = fit_and_predict(fit_knn_probe, plan(k=ks, metric=metric, vote="uniform"), train, val)
    x, queries = train.all_images_memmap.astype(np.float64), val.all_images_memmap.astype(np.float64)
    if metric == "cosine":
        distances = pairwise_distances(queries, x, metric="cosine")
    else:
        distances = (x**2).sum(axis=1) - 2 * queries @ x.T
    ordered = np.sort(distances, axis=1)
    for k, prediction in zip(ks, predictions, strict=True):
        sklearn_model = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x, train.labels.numpy())
        untied = ordered[:, k] - ordered[:, k - 1] > 1e-9  # scikit-learn's heap decides ties of the k-th
        untied |= features == "pixels"  # ties do not change these predictions
        assert untied.any()
        assert (prediction == sklearn_model.predict(queries))[untied].all()


def test_of_equal_distances_the_first_is_nearer_and_of_equal_votes_the_first_class_wins() -> None:
    rows = np.array([[0.0, 2], [0, 2], [2, 0], [2, 0], [1, 0]])
    indices, labels = np.arange(5), torch.tensor([3, 1, 2, 0, 1])
    train = LayerFeatures(rows, indices, labels)
    queries = LayerFeatures(np.array([[0.0, 2], [2, 0]]), np.arange(2), labels[:2])
    predictions = fit_and_predict(
        fit_knn_probe, plan(4, k=(1, 2, 4), metric="euclidean", vote="uniform"), train, queries
    )
    assert predictions.tolist() == [[3, 2], [1, 0], [1, 0]]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_blocks_change_no_neighbour(metric: str) -> None:
    train, val = labelled_features(TRAIN), labelled_features(slice(1000, 1100))
    queries = val.load(slice(None)).double()
    expected = find_nearest_neighbors(queries, _iter_blocks(train, 1000), 20, metric)
    for size in (7, 64, 999):
        blockwise = find_nearest_neighbors(queries, _iter_blocks(train, size), 20, metric)
        assert (blockwise[1] == expected[1]).float().mean() > 0.99  # differences are within rounding
        torch.testing.assert_close(blockwise[0], expected[0], rtol=0, atol=1e-9)


def test_dinos_votes_are_weighed_by_similarity() -> None:
    train, val = labelled_features(TRAIN), labelled_features(VAL)
    k, temperature = 10, 0.07
    predictions = fit_and_predict(fit_knn_probe, plan(k=(k,), temperature=temperature), train, val)[0]
    distances = pairwise_distances(
        val.all_images_memmap.astype(np.float64), train.all_images_memmap.astype(np.float64), metric="cosine"
    )
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    weights = np.exp((1 - np.take_along_axis(distances, order, 1)) / temperature)
    votes = np.zeros((len(predictions), 10))
    for column in range(k):
        np.add.at(votes, (np.arange(len(predictions)), LABELS[TRAIN][order[:, column]]), weights[:, column])
    assert (predictions == votes.argmax(axis=1)).all()
