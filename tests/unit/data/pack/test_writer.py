"""Packing: reproducible bytes, atomic folders, and shards that webdataset reads."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import Manifest, read_manifest
from foveal.data.pack import pack_digits, pack_folder
from foveal.data.pack import writer as packing
from foveal.errors import DataError

# Science: if these change, no earlier run on the digits can be resumed.
DIGITS_TRAIN = "3ca11086f22bb1b07e7f43773bd3fc9ba6998891b2b2f223bf474dadd90e12e8"
DIGITS_VAL = "6e37ba8c2e9d590207b5e0b686f3e0f50394d23bcd6f4155a66a68f97a60ed60"


def opened(folder: Path, **settings: object) -> Dataset:
    return Dataset.open(
        DataConfig.from_dict({"path": str(folder), "image_size": 8, "channels": 1, **settings}, "the test")
    )


def test_digits_are_split_by_class_and_keep_their_digests(digits: Path) -> None:
    dataset = opened(digits)
    assert (dataset.num_samples("train"), dataset.num_samples("val")) == (1437, 360)
    assert dataset.class_counts("val").tolist() == [36] * 10
    assert dataset.samples_per_shard("train").tolist() == [240, 240, 240, 239, 239, 239]
    assert dataset.samples_per_shard("val").tolist() == [180, 180]
    assert dataset.classes == tuple("0123456789")
    assert dataset.samples_digest("train") == DIGITS_TRAIN
    assert dataset.samples_digest("val") == DIGITS_VAL


def test_digits_are_scikit_learns(digits: Path, read_tar: Callable) -> None:
    """Read through webdataset: every digit once, with its pixels and label."""
    images, labels = load_digits(return_X_y=True)
    numbers = set()
    for sample in (sample for file in digits.glob("*.tar") for sample in read_tar(file)):
        number = int(sample["__key__"].removeprefix("digit_"))
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"]))).astype(float)
        assert np.abs(pixels * 16 / 255 - images[number].reshape(8, 8)).max() < 0.05
        assert int(sample["cls"]) == labels[number]
        numbers.add(number)
    assert numbers == set(range(1797))


def test_statistics_are_those_of_training_pixels(digits: Path) -> None:
    dataset = opened(digits)
    keys = [
        dataset.shard_index("train", shard).key(row)
        for shard in range(6)
        for row in range(dataset.samples_per_shard("train")[shard])
    ]
    images, _ = load_digits(return_X_y=True)
    pixels = np.rint(images[[int(key.removeprefix("digit_")) for key in keys]] * 255 / 16) / 255
    assert dataset.mean == pytest.approx((pixels.mean(),), rel=1e-12)
    assert dataset.std == pytest.approx((pixels.std(),), rel=1e-12)


def test_packing_twice_gives_the_same_bytes_and_then_does_nothing(digits: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    assert pack_digits(second)
    for file in digits.iterdir():
        assert (second / file.name).read_bytes() == file.read_bytes(), file.name
    times = {file.name: file.stat().st_mtime_ns for file in second.iterdir()}
    assert not pack_digits(second)
    assert {file.name: file.stat().st_mtime_ns for file in second.iterdir()} == times
    assert [entry.name for entry in tmp_path.iterdir()] == ["second"]


def test_the_sha256_is_that_of_the_file(digits: Path) -> None:
    for split in read_manifest(digits).splits.values():
        for shard in split.shards:
            assert shard.sha256 == hashlib.sha256((digits / shard.file).read_bytes()).hexdigest()
            assert shard.bytes == (digits / shard.file).stat().st_size


def test_an_interrupted_pack_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def interrupt(file: Path, samples: Iterable) -> str:
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        return _write_shard(file, samples)

    _write_shard = packing._write_shard
    monkeypatch.setattr(packing, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack_digits(tmp_path / "digits")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert pack_digits(tmp_path / "digits")


def test_of_two_that_pack_at_once_one_wins_and_both_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "digits"
    write_manifest = packing.write_manifest

    def write_late(manifest: Manifest, draft: Path) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert pack_digits(target)
        write_manifest(manifest, draft)

    monkeypatch.setattr(packing, "write_manifest", write_late)
    assert pack_digits(target)
    assert opened(target).num_samples("train") == 1437
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits"]


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(DataError, match=r"holds other files and no manifest.json: choose another folder"):
        pack_digits(tmp_path)
    with pytest.raises(DataError, match=r"mine.txt is a file: choose another folder"):
        pack_digits(tmp_path / "mine.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_a_target_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"choose another folder|cannot be packed"):
        pack_digits(tmp_path / "file" / "digits")


def write_image(file: Path, colour: tuple[int, int, int]) -> bytes:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), colour).save(file)
    return file.read_bytes()


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, bytes]:
    """tmp_path/source: two classes with ten images each."""
    images = {}
    for number in range(10):
        images[f"cat.{number}"] = write_image(tmp_path / "source" / "cat" / f"cat.{number}.jpeg", (number, 100, 200))
        images[f"dog.{number}"] = write_image(
            tmp_path / "source" / "dog" / "deeper" / f"dog.{number}.PNG", (50, number, 10)
        )
    (tmp_path / "source" / "dog" / "notes.txt").write_text("not an image")
    return images


def test_a_folder_of_images_is_packed_as_it_is(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    options: dict[str, Any] = {"labels": "folders", "val_fraction": 0.2, "samples_per_shard": 5}
    assert pack_folder(tmp_path / "source", tmp_path / "out", **options)
    dataset = opened(tmp_path / "out", channels=3)
    assert dataset.classes == ("cat", "dog")
    assert dataset.manifest.name == "source"
    assert dataset.class_counts("train").tolist() == [8, 8]
    assert dataset.class_counts("val").tolist() == [2, 2]
    assert dataset.samples_per_shard("train").tolist() == [4, 4, 4, 4]
    packed = {}
    for split in ("train", "val"):
        for shard in range(len(dataset.samples_per_shard(split))):
            index = dataset.shard_index(split, shard)
            for row in range(len(index)):
                name = index.key(row).split("_", 1)[1].replace("_", ".")
                packed[name] = dataset.read_bytes(index.shard, *index.find_image_offset_size(row))
                assert index.labels[row] == (0 if name.startswith("cat") else 1)
    assert packed == pictures
    assert dataset.mean[2] == pytest.approx((200 + 10) / 2 / 255, abs=0.01)
    assert dataset.std[2] == pytest.approx((200 - 10) / 2 / 255, abs=0.01)
    assert not pack_folder(tmp_path / "source", tmp_path / "out", **options)


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 1)):
        for turn in range(number):
            write_image(tmp_path / "source" / split / "b" / f"{turn}.png", (1, 2, 3))
    write_image(tmp_path / "source" / "train" / "a" / "0.png", (1, 2, 3))
    pack_folder(tmp_path / "source", tmp_path / "out")
    dataset = opened(tmp_path / "out", channels=3)
    assert dataset.class_counts("train").tolist() == [1, 3]
    assert dataset.class_counts("val").tolist() == [0, 1]
    write_image(tmp_path / "source" / "val" / "c" / "0.png", (1, 2, 3))
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: c"):
        pack_folder(tmp_path / "source", tmp_path / "other")


def test_sources_that_cannot_be_packed_are_sentences(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    assert pictures
    with pytest.raises(DataError, match=r"nowhere: no such folder of images"):
        pack_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "source" / "empty").mkdir()
    with pytest.raises(DataError, match=r"source/empty holds no images .* one folder per class is expected"):
        pack_folder(tmp_path / "source", tmp_path / "out", labels="folders")
    (tmp_path / "source" / "empty" / "bad.jpg").write_bytes(b"\xff\xd8 not a JPEG")
    with pytest.raises(DataError, match=r"bad.jpg does not decode \(.*\): repair or remove it"):
        pack_folder(tmp_path / "source", tmp_path / "out", labels="folders", val_fraction=0)
    assert not (tmp_path / "out").exists()
