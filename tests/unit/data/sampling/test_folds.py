"""Cross-validation folds: a stratified partition of the split, identical on all ranks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import eval_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.sampling.subset import SubsetName, select_subset
from foveal.errors import ConfigError, DataError

Configure = Callable[..., DataConfig]


def settings(**further: Any) -> DataConfig:
    return DataConfig.from_dict({"path": "here", "image_size": 8, "channels": 1, **further}, "the test")


def labelled(labels: np.ndarray, shards: int = 1) -> Any:
    """Return a stand-in for a data set with these labels; at most three classes have names."""
    counts = np.bincount(np.arange(len(labels)) * shards // max(1, len(labels)), minlength=shards)
    names = ("cat", "dog", "hen")[: labels.max() + 1]
    return SimpleNamespace(folder="here", classes=names, samples_per_shard=lambda _: counts, labels=lambda _: labels)


def select_ids(dataset: Any, cfg: DataConfig, part: SubsetName, seed: int = 0) -> np.ndarray:
    subset = select_subset(dataset, cfg, split="train", subset=part, seed=seed)
    assert subset.split_positions is not None
    assert (np.diff(subset.split_positions) > 0).all()
    assert subset.samples_per_shard.sum() == len(subset.split_positions)
    return subset.split_positions


@given(data=st.data())
def test_folds_are_a_stratified_partition(data: st.DataObject) -> None:
    of = data.draw(st.integers(2, 7))
    sizes = data.draw(st.lists(st.integers(of, 5 * of), min_size=1, max_size=4))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(data.draw(st.integers(0, 9))).shuffle(labels)
    dataset, seed = labelled(labels, data.draw(st.integers(1, 5))), data.draw(st.integers(0, 99))
    folds = []
    for number in range(of):
        cfg = settings(fold={"of": of, "number": number})
        folds.append(select_ids(dataset, cfg, "fold", seed))
        assert sorted([*folds[-1], *select_ids(dataset, cfg, "train", seed)]) == list(range(len(labels)))
    assert sorted(np.concatenate(folds)) == list(range(len(labels)))
    shares = np.array([np.bincount(labels[fold], minlength=len(sizes)) for fold in folds])
    assert np.ptp(shares, axis=0).max() <= 1
    assert np.ptp(shares.sum(axis=1)) <= 1


def test_holdout_and_few_labels_come_from_the_other_folds() -> None:
    labels = np.arange(90) % 3
    for number in range(5):
        cfg = settings(fold={"of": 5, "number": number}, holdout_per_class=2, samples_per_class=4)
        fold, train, holdout = (select_ids(labelled(labels), cfg, part) for part in ("fold", "train", "holdout"))
        assert (len(fold), np.bincount(labels[train]).tolist(), np.bincount(labels[holdout]).tolist()) == (
            18,
            [4] * 3,
            [2] * 3,
        )
        assert len({*fold, *train, *holdout}) == 18 + 12 + 6


def test_another_seed_cuts_other_folds(dataset: Dataset, configure: Configure) -> None:
    cfg = configure(fold={"of": 5, "number": 0})
    first, repeated, different = (select_ids(dataset, cfg, "fold", seed).tolist() for seed in (0, 0, 1))
    assert first == repeated != different


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_evaluates_the_fold_and_trains_on_the_rest(
    size: int, dataset: Dataset, configure: Configure
) -> None:
    cfg = configure(fold={"of": 5, "number": 3})
    fold = select_ids(dataset, cfg, "fold", 2)
    evaluated: list[int] = []
    for rank in range(size):
        for batch in eval_batches(
            dataset, cfg, split="train", subset="fold", training_seed=2, rank=rank, world_size=size, microbatch_size=50
        ):
            evaluated += batch.ids[batch.valid].tolist()
    assert sorted(evaluated) == fold.tolist()
    training = build_training_set(dataset, cfg, seed=2, batch_size=48)
    ranges = [(rank * 48 // size, (rank + 1) * 48 // size) for rank in range(size)]
    slots = [training.order.assign_slots(step, start, stop) for step in range(3) for start, stop in ranges]
    trained = np.concatenate([training.sample_keys(step_slots) % training.num_ids for step_slots in slots])
    assert len(trained) == 144
    assert not set(trained) & set(fold)


@pytest.mark.parametrize(
    ("labels", "further", "kind", "sentence"),
    [
        ([0] * 9 + [1] * 3, {}, DataError, r"class 1 \('dog'\) has 3 samples, too few for 5 folds"),
        ([0, 1, 2] * 9 + [7] * 3, {}, DataError, "class 7 has 3 samples, too few for 5 folds"),
        ([0, 2] * 9, {}, DataError, "class 'dog' has no sample in split 'train', and data.fold needs some of each"),
        ([0] * 9 + [-1], {}, DataError, "1 samples of split 'train' have no label"),
        (
            [0] * 9,
            {"samples_per_class": 9},
            DataError,
            "class 0 has 7 samples outside fold 0 of 5, too few for data.samples_per_class=9",
        ),
    ],
)
def test_folds_that_cannot_be_cut(
    labels: list[int], further: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        select_ids(labelled(np.array(labels)), settings(fold={"of": 5, "number": 0}, **further), "train")


@pytest.mark.parametrize(
    ("fold", "sentence"),
    [
        ({"of": 1, "number": 0}, "fold.of: input should be greater than or equal to 2"),
        ({"of": 3, "number": 3}, "number=3 is none of the 3 folds, whose numbers begin at 0"),
        ({"of": 3}, "fold.number is missing"),
    ],
)
def test_folds_that_are_none(fold: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(fold=fold)


def test_without_folds_there_is_none_to_evaluate_on() -> None:
    with pytest.raises(ConfigError, match=r"data\.fold=null leaves no fold to evaluate on"):
        select_ids(labelled(np.zeros(9, int)), settings(), "fold")


def test_a_mixed_set_must_not_bring_the_fold_back(configure: Configure) -> None:
    mixed = configure()
    cfg = configure(fold={"of": 5, "number": 0}, mix=[{"path": mixed.path, "split": "train", "fraction": 0.25}])
    with pytest.raises(ConfigError, match=r"holds the images that data.fold keeps out of training"):
        build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=48)
    cfg = configure(fold={"of": 5, "number": 0}, mix=[{"path": mixed.path, "split": "val", "fraction": 0.25}])
    assert build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=48).sources[1].subset.split_positions is None
