"""Indexing of real foreign shards, from the folder in FOVEAL_TEST_DATA."""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset, open_unchecked_dataset
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.data.tools.verify import verify_dataset
from foveal.errors import DataError

ROOT = os.environ.get("FOVEAL_TEST_DATA")

pytestmark = pytest.mark.skipif(not ROOT, reason="FOVEAL_TEST_DATA is not set: no foreign shards to read")


@pytest.fixture(scope="module")
def shards() -> Path:
    return Path(str(ROOT))


@pytest.fixture(scope="module")
def cifar10(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three of the twelve shards, unpacked; removed afterwards because they are large."""
    folder = tmp_path_factory.mktemp("foreign") / "cifar10"
    folder.mkdir()
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        (folder / name).write_bytes(gzip.decompress((shards / "cifar10" / f"{name}.gz").read_bytes()))
    yield folder
    for file in folder.iterdir():
        file.unlink()


def test_a_folder_that_is_only_read_is_indexed_elsewhere(shards: Path, tmp_path: Path) -> None:
    folder = shards / "imagenette224"
    before = sorted(entry.name for entry in folder.iterdir())
    source = json.loads((folder / "source.json").read_text())
    manifest = index_folder(str(folder), tmp_path / "index", classes=source["classes"])
    assert sorted(entry.name for entry in folder.iterdir()) == before
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 2500, "val": 600}
    cfg = DataConfig.from_dict(
        {
            "path": "${FOVEAL_TEST_DATA}/imagenette224",
            "index": str(tmp_path / "index"),
            "image_size": 64,
            "lanes": 8,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
        "the test",
    )
    dataset = Dataset.open(cfg)
    assert dataset.class_counts("train").tolist() == source["splits"]["train"]["per_class"]
    training = build_training_set(dataset, cfg, seed=0, batch_size=64)
    with train_batches(training, cfg, rank=1, world_size=2, microbatch_size=16, start_step=30, stop_step=31) as batches:
        images = next(batches).images
    assert images.shape == (16, 3, 64, 64)
    assert images.float().std() > 30


def test_samples_are_those_that_webdataset_reads(cifar10: Path, read_tar: Callable) -> None:
    index_folder(str(cifar10))
    cfg = DataConfig.from_dict({"path": str(cifar10), "image_size": 32, "eval_crop_ratio": 1.0}, "the test")
    dataset = Dataset.open(cfg)
    assert (dataset.num_samples("train"), dataset.num_samples("val")) == (10_000, 5_000)
    assert dataset.classes == tuple("0123456789")
    index = dataset.shard_index("val", 0)
    samples = read_tar(cifar10 / "val-000000.tar")
    assert len(samples) == len(index)
    for row, sample in enumerate(samples):
        assert index.key(row) == sample["__key__"]
        assert index.labels[row] == int(sample["cls"])
        assert dataset.read_bytes(index.shard, *index.find_image_offset_size(row)) == sample["png"]
    rows = eval_batches(
        dataset, cfg, split="val", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=8
    )
    batch = next(rows)
    rows.close()
    for row in range(8):
        picture = Image.open(io.BytesIO(dataset.read_bytes(index.shard, *index.find_image_offset_size(row)))).convert(
            "RGB"
        )
        assert np.array_equal(batch.images[row].numpy(), np.asarray(picture).transpose(2, 0, 1))


def test_gzipped_shards_are_one_sentence(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train-000000.tar.gz is compressed, .* unpack it to train-000000.tar and index"
    ):
        index_folder(str(shards / "cifar10"), tmp_path / "index")
    with pytest.raises(DataError, match=r"cifar10: these shards are compressed, which has no random access; unpack"):
        Dataset.open(DataConfig.from_dict({"path": str(shards / "cifar10"), "image_size": 32}, "the test"))


def test_members_that_are_masks_are_kept_apart(shards: Path, tmp_path: Path) -> None:
    manifest = index_folder(str(shards / "camvid"), tmp_path / "index")
    assert manifest.fields == ("jpg", "mask.png")
    assert manifest.classes is None
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 367, "val": 101}
    dataset = open_unchecked_dataset(str(shards / "camvid"), str(tmp_path / "index"))
    assert verify_dataset(dataset, full=True, workers=2) == []
