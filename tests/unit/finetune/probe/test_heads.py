"""What probes compute is what others compute: LARS as timm's, regression and neighbours as scikit-learn's."""

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


def part(rows: slice, features: np.ndarray = PIXELS) -> LayerFeatures:
    labels = torch.from_numpy(LABELS[rows])
    return LayerFeatures(features[rows].astype(np.float32), np.arange(len(labels)), labels)


def plan(classes: int = 10, epochs: int = 3, images: int = 128, **probe: Any) -> Any:
    """As much of a plan as a kind looks at."""
    optim = SimpleNamespace(floor_lr=0.0, warmup_epochs=1)
    batch = SimpleNamespace(images=images, at_once=64)
    cfg = SimpleNamespace(seed=1, epochs=epochs, batch=batch, optim=optim)
    return SimpleNamespace(cfg=cfg, probe=ProbeConfig(**probe), classes=tuple(map(str, range(classes))))


def finished(work: Resumable) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def guesses(fit: Any, plan: Any, train: LayerFeatures, val: LayerFeatures) -> np.ndarray:
    return finished(finished(fit(plan, train))(val)).numpy()


def test_lars_is_timms_for_every_rate_at_once() -> None:
    torch.manual_seed(0)
    rates, start = [0.1, 3.0], [torch.randn(10, 64) * 0.01, torch.zeros(10)]
    nothing = [torch.zeros(10, 64), torch.zeros(10)]  # whose norm is 0: no trust, but a step
    slopes = [[torch.randn(10, 64), torch.randn(10)] for _ in range(4)]
    for begin in (start, nothing):
        weight, bias = (each.repeat(2, *[1] * each.ndim) for each in begin)
        moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for slope in slopes:
            lars_step(weight, slope[0].expand_as(weight), moments[0], torch.tensor(rates))
            momentum_step(bias, slope[1].expand_as(bias), moments[1], torch.tensor(rates))
        for number, rate in enumerate(rates):
            hers = [torch.nn.Parameter(each.clone()) for each in begin]
            told = [{"params": [hers[0]], "always_adapt": True}, {"params": [hers[1]], "always_adapt": False}]
            optimizer = cast(Any, Lars)(told, lr=rate, momentum=0.9, weight_decay=0.0)
            for slope in slopes:
                hers[0].grad, hers[1].grad = slope[0].clone(), slope[1].clone()
                optimizer.step()
            torch.testing.assert_close(weight[number], hers[0].detach(), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(bias[number], hers[1].detach(), rtol=1e-5, atol=1e-7)


def test_a_head_does_not_depend_on_the_others_of_the_sweep() -> None:
    train, val = part(TRAIN), part(VAL)
    together = guesses(fit_linear_probe, plan(linear_lr_per_256=(0.1, 3.0)), train, val)
    for number, rate in enumerate((0.1, 3.0)):
        assert (
            guesses(fit_linear_probe, plan(linear_lr_per_256=(rate,)), train, val)[0] == together[number]
        ).mean() > 0.998
    again = guesses(fit_linear_probe, plan(linear_lr_per_256=(0.1, 3.0)), train, val)
    assert (again == together).all()
    assert (together[0] != together[1]).any()


@pytest.mark.parametrize("c", [0.01, 1.0])
@pytest.mark.parametrize("classes", [10, 2])
def test_logistic_regression_is_scikit_learns(c: float, classes: int) -> None:
    chosen = np.isin(LABELS, range(classes))
    rows = (PIXELS[chosen] / 16).astype(np.float32)
    labels = LABELS[chosen]
    train = LayerFeatures(rows, np.arange(len(labels)), torch.from_numpy(labels))
    zero, one = torch.zeros(64, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    weight, bias = finished(fit_logistic_regression(train, c, classes, zero, one))
    hers = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(rows.astype(np.float64), labels)
    ours = torch.cat([weight, bias[:, None]], dim=1)
    theirs = np.concatenate([hers.coef_, hers.intercept_[:, None]], axis=1)
    if classes == 2:  # one weight there, the difference of two here
        difference = (ours[1] - ours[0]).numpy()
        np.testing.assert_allclose(difference, theirs[0], atol=2e-4)
    else:
        centred = (
            ours - ours.mean(dim=0)
        ).numpy()  # what is common to all classes changes nothing; its size is free for biases
        np.testing.assert_allclose(centred, theirs - theirs.mean(axis=0), atol=2e-4 * np.abs(theirs).max())
    assert (guess_of(weight, bias, rows) == hers.predict(rows.astype(np.float64))).all()


def guess_of(weight: Tensor, bias: Tensor, rows: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(rows).double() @ weight.T + bias).argmax(dim=1).numpy()


def test_the_linear_probe_agrees_with_scikit_learn_at_its_default_tolerance() -> None:
    """On the same standardised features: the kind ``logistic`` guess for guess, ``linear`` by its accuracy."""
    train, val = part(TRAIN), part(VAL)
    mean, scale = PIXELS[TRAIN].mean(axis=0), PIXELS[TRAIN].std(axis=0)
    rows = (PIXELS - mean) / np.where(scale > 0, scale, 1)
    hers = LogisticRegression(C=0.1, max_iter=1000).fit(rows[TRAIN], LABELS[TRAIN])
    ours = guesses(fit_logistic_probe, plan(logistic_c=(0.1,)), train, val)[0]
    assert (ours == hers.predict(rows[VAL])).mean() > 0.995
    by_steps = guesses(fit_linear_probe, plan(epochs=60, linear_lr_per_256=(20.0,)), train, val)[0]
    score = hers.score(rows[VAL], LABELS[VAL])
    assert (by_steps == LABELS[VAL]).mean() == pytest.approx(score, abs=0.02)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("features", ["pixels", "coarse", "twice"])
def test_neighbours_are_scikit_learns(metric: str, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse pixels and images that are there twice: many distances are equal, and many votes."""
    monkeypatch.setattr("finetune.probe.knn._IMAGE_BLOCK_SIZE", 300)
    monkeypatch.setattr("finetune.probe.knn._QUERY_BLOCK_SIZE", 190)
    rows = {"pixels": PIXELS, "coarse": np.round(PIXELS / 8), "twice": np.concatenate([PIXELS[:500]] * 3)}[features]
    train, val, ks = part(TRAIN, rows), part(slice(1000, 1400), rows), (1, 2, 5, 8)
    if features == "twice":
        ks = (2, 8)
        train = LayerFeatures(
            train.memmap, train.labelled_indices, torch.from_numpy(LABELS[TRAIN])
        )  # the same image under two labels
    ours = guesses(fit_knn_probe, plan(k=ks, metric=metric, vote="uniform"), train, val)
    x, queries = train.memmap.astype(np.float64), val.memmap.astype(np.float64)
    if metric == "cosine":
        distances = pairwise_distances(queries, x, metric="cosine")
    else:
        distances = (x**2).sum(axis=1) - 2 * queries @ x.T
    ordered = np.sort(distances, axis=1)
    for k, guess in zip(ks, ours, strict=True):
        hers = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(x, train.labels.numpy())
        clear = ordered[:, k] - ordered[:, k - 1] > 1e-9  # else it is up to scikit-learn's heap who is the k-th
        clear |= features == "pixels"  # where it makes no difference
        assert clear.any()
        assert (guess == hers.predict(queries))[clear].all()


def test_of_equal_distances_the_first_is_nearer_and_of_equal_votes_the_first_class_wins() -> None:
    rows = np.array([[0.0, 2], [0, 2], [2, 0], [2, 0], [1, 0]])
    known, labels = np.arange(5), torch.tensor([3, 1, 2, 0, 1])
    train = LayerFeatures(rows, known, labels)
    queries = LayerFeatures(np.array([[0.0, 2], [2, 0]]), np.arange(2), labels[:2])
    ours = guesses(fit_knn_probe, plan(4, k=(1, 2, 4), metric="euclidean", vote="uniform"), train, queries)
    assert ours.tolist() == [[3, 2], [1, 0], [1, 0]]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_blocks_change_no_neighbour(metric: str) -> None:
    train, val = part(TRAIN), part(slice(1000, 1100))
    queries = val.load(slice(None)).double()
    whole = find_nearest_neighbors(queries, _iter_blocks(train, 1000), 20, metric)
    for size in (7, 64, 999):
        blocks = find_nearest_neighbors(queries, _iter_blocks(train, size), 20, metric)
        assert (blocks[1] == whole[1]).float().mean() > 0.99  # what differs lies within rounding
        torch.testing.assert_close(blocks[0], whole[0], rtol=0, atol=1e-9)


def test_dinos_votes_are_weighed_by_similarity() -> None:
    train, val = part(TRAIN), part(VAL)
    k, temperature = 10, 0.07
    ours = guesses(fit_knn_probe, plan(k=(k,), temperature=temperature), train, val)[0]
    distances = pairwise_distances(val.memmap.astype(np.float64), train.memmap.astype(np.float64), metric="cosine")
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    weights = np.exp((1 - np.take_along_axis(distances, order, 1)) / temperature)
    votes = np.zeros((len(ours), 10))
    for column in range(k):
        np.add.at(votes, (np.arange(len(ours)), LABELS[TRAIN][order[:, column]]), weights[:, column])
    assert (ours == votes.argmax(axis=1)).all()
