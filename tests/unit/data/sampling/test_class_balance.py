"""Weighted sampling: small classes come as often as they should, exactly, on any ranks, and each time look different."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from foveal.data import DataConfig, Dataset, build_training_set, train_batches
from foveal.data.sampling.subset import select_subset
from foveal.errors import DataError

COUNTS = (40, 10, 3)


class Uneven:
    """A data set of which nothing but the labels and the classes' names is asked."""

    folder = "here"

    def __init__(self, labels: np.ndarray, classes: tuple[str, ...] | None = ("cat", "dog", "hen")) -> None:
        self._labels, self.classes = labels, classes

    def samples_per_shard(self, _split: str) -> np.ndarray:
        return np.array([20, len(self._labels) - 20])

    def labels(self, _split: str) -> np.ndarray:
        return self._labels


def uneven() -> Any:
    return Uneven(np.random.default_rng(0).permutation(np.repeat(np.arange(3), COUNTS)))


def config(**settings: Any) -> DataConfig:
    return DataConfig.from_dict({"path": "here", "image_size": 8, "channels": 1, "lanes": 1} | settings, "the test")


@pytest.mark.parametrize(
    ("balance", "wanted"),
    [(1.0, (40, 40, 40)), (0.5, (40, 20, round(3 * (40 / 3) ** 0.5))), (0.0, COUNTS)],
)
def test_classes_come_as_often_as_they_should(balance: float, wanted: tuple[int, ...]) -> None:
    dataset = uneven()
    part = select_subset(dataset, config(balance=balance), split="train", subset="train", seed=0)
    labels = dataset.labels("train")
    ids = np.arange(len(labels)) if part.chosen_ids is None else part.chosen_ids
    assert tuple(np.bincount(labels[ids])) == wanted
    assert part.samples_per_shard.sum() == sum(wanted)
    times = Counter(ids.tolist())
    for label in range(3):
        found = {times[int(each)] for each in np.flatnonzero(labels == label)}
        assert max(found) - min(found) <= 1, "no sample of a class comes much more often than another"
    if part.copy_numbers is not None:
        assert part.chosen_ids is not None
        pairs = set(zip(part.chosen_ids.tolist(), part.copy_numbers.tolist(), strict=True))
        assert len(pairs) == len(part.chosen_ids), "every time has a number of its own"
        assert part.copy_numbers.max() + 1 == part.max_copies


def test_what_is_held_out_or_evaluated_is_not_repeated() -> None:
    cfg = config(balance=1.0, holdout_per_class=1)
    assert len(select_subset(uneven(), cfg, split="train", subset="holdout", seed=0)) == 3
    assert len(select_subset(uneven(), cfg, split="train", subset="all", seed=0)) == sum(COUNTS)
    assert len(select_subset(uneven(), cfg, split="train", subset="train", seed=0)) == 3 * 39


def test_labels_are_needed() -> None:
    with pytest.raises(DataError, match=r"have no label; .*data.balance and data.fold need one"):
        select_subset(Uneven(np.array([0] * 21 + [-1])), config(balance=1.0), split="train", subset="train", seed=0)  # type: ignore[arg-type]


def test_a_class_without_samples_cannot_come_as_often_as_others() -> None:
    place: dict[str, Any] = {"split": "train", "subset": "train", "seed": 0}
    dataset: Any = Uneven(uneven().labels("train"), classes=("cat", "dog", "hen", "owl"))
    with pytest.raises(DataError, match=r"class 'owl' has no sample in split 'train', and data.balance needs some"):
        select_subset(dataset, config(balance=0.5), **place)
    assert select_subset(dataset, config(), **place).chosen_ids is None
    unnamed: Any = Uneven(dataset.labels("train"), classes=None)
    assert len(select_subset(unnamed, config(balance=1.0), **place)) == 120


def test_every_time_is_another_draw_and_ranks_see_the_same(configure: Callable[..., DataConfig]) -> None:
    """The digits are uneven by a few: some come twice in an epoch, and are cut out differently."""
    cfg = configure(balance=1.0, lanes=1)
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=50)
    assert training.sources[0].subset.max_copies == 2

    def draws(size: int) -> np.ndarray:
        found = []
        for rank in range(size):
            place: dict[str, Any] = {
                "rank": rank,
                "world_size": size,
                "microbatch_size": 25,
                "start_step": 0,
                "stop_step": 28,
            }
            with train_batches(training, cfg, **place) as batches:
                found.append(np.concatenate([batch.sample_keys.numpy() for batch in batches]).reshape(28, -1))
        return np.concatenate(found, axis=1)

    alone = draws(1)
    assert np.array_equal(alone, draws(2))
    assert len(np.unique(alone)) == alone.size, "an epoch, and no draw twice"
    again = Counter((alone % training.num_ids).reshape(-1).tolist())
    assert set(again.values()) == {1, 2}
