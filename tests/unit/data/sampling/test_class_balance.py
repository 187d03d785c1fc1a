"""Oversampling of small classes: exact counts on any number of ranks, and a new augmentation for every copy."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.sampling.subset import select_subset
from foveal.errors import DataError

COUNTS = (40, 10, 3)


class UnevenDataset:
    """Stand-in for a data set with labels and class names only."""

    folder = "here"

    def __init__(self, labels: np.ndarray, classes: tuple[str, ...] | None = ("cat", "dog", "hen")) -> None:
        self._labels, self.classes = labels, classes

    def samples_per_shard(self, _split: str) -> np.ndarray:
        return np.array([20, len(self._labels) - 20])

    def labels(self, _split: str) -> np.ndarray:
        return self._labels


def uneven() -> Any:
    return UnevenDataset(np.random.default_rng(0).permutation(np.repeat(np.arange(3), COUNTS)))


def config(**settings: Any) -> DataConfig:
    return DataConfig.from_dict({"path": "here", "image_size": 8, "channels": 1, "lanes": 1} | settings, "the test")


@pytest.mark.parametrize(
    ("balance", "expected"),
    [(1.0, (40, 40, 40)), (0.5, (40, 20, round(3 * (40 / 3) ** 0.5))), (0.0, COUNTS)],
)
def test_classes_come_as_often_as_they_should(balance: float, expected: tuple[int, ...]) -> None:
    dataset = uneven()
    part = select_subset(dataset, config(balance=balance), split="train", subset="train", seed=0)
    labels = dataset.labels("train")
    ids = np.arange(len(labels)) if part.split_positions is None else part.split_positions
    assert tuple(np.bincount(labels[ids])) == expected
    assert part.samples_per_shard.sum() == sum(expected)
    copies = Counter(ids.tolist())
    for label in range(3):
        class_copies = {copies[int(sample)] for sample in np.flatnonzero(labels == label)}
        assert max(class_copies) - min(class_copies) <= 1, "samples of a class differ by at most one copy"
    if part.copy_numbers is not None:
        assert part.split_positions is not None
        pairs = set(zip(part.split_positions.tolist(), part.copy_numbers.tolist(), strict=True))
        assert len(pairs) == len(part.split_positions), "every copy has a number of its own"
        assert part.copy_numbers.max() + 1 == part.max_copies


def test_what_is_held_out_or_evaluated_is_not_repeated() -> None:
    cfg = config(balance=1.0, holdout_per_class=1)
    assert len(select_subset(uneven(), cfg, split="train", subset="holdout", seed=0)) == 3
    assert len(select_subset(uneven(), cfg, split="train", subset="all", seed=0)) == sum(COUNTS)
    assert len(select_subset(uneven(), cfg, split="train", subset="train", seed=0)) == 3 * 39


def test_labels_are_needed() -> None:
    unlabelled: Any = UnevenDataset(np.array([0] * 21 + [-1]))
    with pytest.raises(DataError, match=r"have no label; .*data.balance and data.fold need one"):
        select_subset(unlabelled, config(balance=1.0), split="train", subset="train", seed=0)


def test_a_class_without_samples_cannot_come_as_often_as_others() -> None:
    selection: dict[str, Any] = {"split": "train", "subset": "train", "seed": 0}
    dataset: Any = UnevenDataset(uneven().labels("train"), classes=("cat", "dog", "hen", "owl"))
    with pytest.raises(DataError, match=r"class 'owl' has no sample in split 'train', and data.balance needs some"):
        select_subset(dataset, config(balance=0.5), **selection)
    assert select_subset(dataset, config(), **selection).split_positions is None
    unnamed: Any = UnevenDataset(dataset.labels("train"), classes=None)
    assert len(select_subset(unnamed, config(balance=1.0), **selection)) == 120


def test_every_time_is_another_draw_and_ranks_see_the_same(configure: Callable[..., DataConfig]) -> None:
    """The digits' classes differ by a few samples: some appear twice in an epoch, under two sample keys."""
    cfg = configure(balance=1.0, lanes=1)
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=50)
    assert training.sources[0].subset.max_copies == 2

    def sample_keys(size: int) -> np.ndarray:
        rank_keys = []
        for rank in range(size):
            settings: dict[str, Any] = {
                "rank": rank,
                "world_size": size,
                "microbatch_size": 25,
                "start_step": 0,
                "stop_step": 28,
            }
            with train_batches(training, cfg, **settings) as batches:
                rank_keys.append(np.concatenate([batch.sample_keys.numpy() for batch in batches]).reshape(28, -1))
        return np.concatenate(rank_keys, axis=1)

    keys = sample_keys(1)
    assert np.array_equal(keys, sample_keys(2))
    assert len(np.unique(keys)) == keys.size, "an epoch has no sample key twice"
    visits = Counter((keys % training.num_ids).reshape(-1).tolist())
    assert set(visits.values()) == {1, 2}
