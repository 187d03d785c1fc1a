"""Batches do not depend on ranks, microbatch size or start step; evaluation covers every sample once."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.decode import decode_image
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.sampling.subset import SubsetName
from foveal.errors import ConfigError, DataError

BATCH = 64
Configure = Callable[..., DataConfig]


def train(
    cfg: DataConfig, start_step: int, stop_step: int, rank: int = 0, world_size: int = 1, microbatch_size: int = 16
) -> list[Batch]:
    training_set = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH)
    with train_batches(
        training_set,
        cfg,
        rank=rank,
        world_size=world_size,
        microbatch_size=microbatch_size,
        start_step=start_step,
        stop_step=stop_step,
    ) as batches:
        return list(batches)


def concatenate(batches: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def same(batches: list[Batch], other_batches: list[Batch]) -> bool:
    return all(
        torch.equal(concatenate(batches, name), concatenate(other_batches, name))
        for name in ("images", "labels", "ids", "sample_keys", "valid")
    )


def test_a_batch_is_what_its_ids_say(configure: Configure, dataset: Dataset) -> None:
    cfg = configure(augment={"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0})
    batches = train(cfg, 0, 2)
    assert [(batch.step, batch.epoch, batch.microbatch_index) for batch in batches[3:6]] == [
        (0, 0, 3),
        (1, 0, 0),
        (1, 0, 1),
    ]
    labels = dataset.labels("train")
    starts = np.cumsum(dataset.samples_per_shard("train")) - dataset.samples_per_shard("train")
    batch = batches[5]
    assert batch.images.shape == (16, 1, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.valid.all()
    for row, sample in enumerate(batch.ids.tolist()):
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        index = dataset.shard_index("train", shard)
        data = dataset.read_bytes(index.shard, *index.find_image_offset_size(sample - starts[shard]))
        assert np.array_equal(batch.images[row, 0].numpy(), np.asarray(decode_image(data, 1)))
        assert batch.labels[row] == labels[sample]


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(2, 16), (4, 8), (1, 64), (8, 1)])
def test_ranks_and_micros_do_not_change_a_step(configure: Configure, world_size: int, microbatch_size: int) -> None:
    reference = train(configure(), 20, 24)  # over the end of epoch 0, which has 22 steps
    ranks = [train(configure(), 20, 24, rank, world_size, microbatch_size) for rank in range(world_size)]
    count = BATCH // world_size // microbatch_size
    in_slot_order = [
        batch for step in range(4) for batches in ranks for batch in batches[step * count : (step + 1) * count]
    ]
    assert same(reference, in_slot_order)
    assert [batch.epoch for batch in ranks[0]][::count] == [0, 0, 1, 1]


@pytest.mark.parametrize("start", [1, 13, 22, 43])
def test_resuming_is_starting(configure: Configure, start: int) -> None:
    assert same(train(configure(), 0, 46)[4 * start : 4 * start + 8], train(configure(), start, start + 2))


def test_skipped_batches_are_passed_over(configure: Configure) -> None:
    cfg = configure()
    training = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH)
    rank_arguments: dict[str, Any] = {"rank": 0, "world_size": 1, "microbatch_size": BATCH}
    with train_batches(training, cfg, **rank_arguments, start_step=0, stop_step=26) as batches:
        reference = list(batches)
    skipped = (2, 3, 22)
    with train_batches(training, cfg, **rank_arguments, start_step=1, stop_step=23, skipped_batches=skipped) as batches:
        resumed = list(batches)
    consumed = [1, *range(4, 22), 23, 24, 25]
    assert same(resumed, [reference[number] for number in consumed])
    assert [batch.step for batch in resumed] == list(range(1, 23))
    assert [batch.epoch for batch in resumed] == [reference[number].epoch for number in consumed]


def test_augmentation_changes_with_the_epoch_and_not_with_the_place_in_the_batch(configure: Configure) -> None:
    first, second = ({}, {})
    for batch in train(configure(), 0, 44):
        images = second if batch.epoch else first
        images.update(zip(batch.ids.tolist(), batch.images, strict=True))
    common = set(first) & set(second)
    assert len(common) > 1300
    assert sum(torch.equal(first[sample], second[sample]) for sample in common) < 100
    other_lanes = {
        sample: image
        for batch in train(configure(lanes=4), 0, 22)
        for sample, image in zip(batch.ids.tolist(), batch.images, strict=True)
    }
    assert all(torch.equal(other_lanes[sample], first[sample]) for sample in set(other_lanes) & set(first))


def test_the_order_tells_the_plan(configure: Configure, dataset: Dataset) -> None:
    order = build_training_set(dataset, configure(), seed=3, batch_size=BATCH).order
    assert (order.first_source_size, order.steps_per_epoch, order.dropped_per_epoch) == (1437, 22, 29)


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 64), (1, 7), (3, 50), (4, 100), (4, 120)])
def test_evaluation_sees_every_sample_once(
    configure: Configure, dataset: Dataset, world_size: int, microbatch_size: int
) -> None:
    cfg = configure(eval_crop_ratio=1.0)
    ranks = [
        list(
            eval_batches(
                dataset,
                cfg,
                split="val",
                subset="all",
                training_seed=0,
                rank=rank,
                world_size=world_size,
                microbatch_size=microbatch_size,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank_batches in ranks for batch in rank_batches]
    assert all(len(batch.ids) == microbatch_size for batch in batches)
    ids, valid, labels = (concatenate(batches, name) for name in ("ids", "valid", "labels"))
    assert sorted(ids[valid].tolist()) == list(range(360))
    assert (ids[~valid] == -1).all()
    assert (labels[~valid] == -1).all()
    assert concatenate(batches, "images")[~valid].eq(0).all()
    assert torch.equal(labels[valid], torch.from_numpy(dataset.labels("val"))[ids[valid]])


def test_few_labels_are_nested_and_apart_from_the_holdout(configure: Configure, dataset: Dataset) -> None:
    def ids(subset: SubsetName, **settings: int) -> list[int]:
        cfg = configure(**settings)
        batches = list(
            eval_batches(
                dataset, cfg, split="train", subset=subset, training_seed=3, rank=0, world_size=1, microbatch_size=64
            )
        )
        return concatenate(batches, "ids")[concatenate(batches, "valid")].tolist()

    two, five = ids("train", samples_per_class=2), ids("train", samples_per_class=5, holdout_per_class=3)
    holdout = ids("holdout", samples_per_class=5, holdout_per_class=3)
    assert np.bincount(dataset.labels("train")[two]).tolist() == [2] * 10
    assert np.bincount(dataset.labels("train")[holdout]).tolist() == [3] * 10
    assert set(two) < set(five)
    assert not set(five) & set(holdout)
    rest, holdout = ids("train", holdout_per_class=4), ids("holdout", holdout_per_class=4)
    assert sorted(rest + holdout) == list(range(1437))
    assert len(holdout) == 40
    assert ids("all", samples_per_class=2, holdout_per_class=4) == list(range(1437))


def test_another_seed_draws_other_labels(configure: Configure, dataset: Dataset) -> None:
    chosen = []
    for seed in (0, 1):
        rows = eval_batches(
            dataset,
            configure(samples_per_class=2),
            split="train",
            subset="train",
            training_seed=seed,
            rank=0,
            world_size=1,
            microbatch_size=20,
        )
        chosen.append(next(rows).ids.tolist())
        rows.close()
    assert chosen[0] != chosen[1]


def test_training_on_few_labels_takes_each_once_per_epoch(configure: Configure) -> None:
    dataset, cfg = Dataset.open(configure(samples_per_class=2, lanes=5)), configure(samples_per_class=2, lanes=5)
    training = build_training_set(dataset, cfg, seed=0, batch_size=20)
    with train_batches(training, cfg, rank=0, world_size=1, microbatch_size=20, start_step=0, stop_step=3) as batches:
        steps = [sorted(batch.ids.tolist()) for batch in batches]
    assert steps[0] == steps[1] == steps[2]
    assert len(set(steps[0])) == 20


def test_a_shard_that_is_cut_while_training_is_named(configure: Configure, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(digits, folder)
    cfg = configure(path=str(folder))
    dataset = Dataset.open(cfg)
    (folder / "val-000001.tar").write_bytes(b"")
    rows = eval_batches(
        dataset, cfg, split="val", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=32
    )
    with pytest.raises(DataError, match=r"val-000001.tar is cut short: \d+ bytes at \d+ are asked for, 0 left"):
        list(rows)


def test_colour_and_size_are_what_the_config_says(tmp_path: Path, write_tar: Callable, configure: Configure) -> None:
    red = io.BytesIO()
    Image.new("RGB", (31, 17), (200, 10, 30)).save(red, "PNG")
    write_tar(tmp_path / "train-0.tar", [("a.png", red.getvalue())])
    index_folder(str(tmp_path))
    cfg = configure(path=str(tmp_path), image_size=12, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, val="train")
    dataset = Dataset.open(cfg)
    (batch,) = eval_batches(
        dataset, cfg, split="train", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=1
    )
    assert batch.images.shape == (1, 3, 12, 12)
    assert batch.images[0, :, 5, 5].tolist() == [200, 10, 30]
    assert batch.labels.tolist() == [-1]
    assert dataset.classes is None


def test_ranks_and_micros_that_do_not_fit_are_sentences(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"cannot be dealt to 3 ranks"):
        train(configure(), 0, 1, world_size=3)
    with pytest.raises(ConfigError, match=r"batch.max_micro_size=24 does not divide the 64 images"):
        train(configure(), 0, 1, microbatch_size=24)
    with pytest.raises(ConfigError, match=r"data.lanes=48 does not fit"):
        train(configure(lanes=48), 0, 1)


def test_moving_a_batch_keeps_everything(configure: Configure) -> None:
    batch = train(configure(), 5, 6)[1]
    moved = batch.to("cpu", non_blocking=True)
    assert same([batch], [moved])
    assert (moved.step, moved.epoch, moved.microbatch_index) == (5, 0, 1)
    assert batch.to("meta").images.device.type == "meta"
