"""Packs are atomic under SIGKILL, a full disk and concurrent packs; shards have the requested size."""

import errno
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveal.data.format.manifest import read_manifest
from foveal.data.pack import atomic_folder, pack_folder
from foveal.data.pack import writer as packing
from foveal.data.pack.encode import EncodedSample
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackSample, PackSplit, hashed_order, make_webdataset_key, split_train_val
from foveal.errors import ConfigError, DataError

# The write of the second shard never ends; the test kills the process once the write has begun.
KILLED = """
import sys, time
from pathlib import Path
from foveal.data.pack import pack_folder, writer

write_shard = writer._write_shard

def stuck(file, samples):
    if file.name != "train-000001.tar":
        return write_shard(file, samples)
    file.write_bytes(b"half a shard")
    print("begun", flush=True)
    time.sleep(1000)

writer._write_shard = stuck
pack_folder(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=4)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of noise: two classes, 16 images of 12 x 9 pixels."""
    numbers = np.random.default_rng(0)
    folder = tmp_path / "in" / "source"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            noise = numbers.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_pack_leaves_nothing_and_the_next_one_cleans_up(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out" / "set"
    command = [sys.executable, "-c", KILLED, str(source), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        (dead,) = target.parent.iterdir()
        atomic_folder._remove_dead_drafts(target)
        assert (dead / "train-000000.tar").is_file(), "a living process lost its draft"
        process.send_signal(signal.SIGKILL)
    assert not target.exists() and dead.is_dir()
    assert pack_folder(source, target, samples_per_shard=4)
    assert [entry.name for entry in target.parent.iterdir()] == ["set"]
    pack_folder(source, tmp_path / "other", samples_per_shard=4)
    assert contents(target) == contents(tmp_path / "other")
    assert not [name for name in contents(target) if name.startswith(".")]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing._HashingWriter, "write", full)
    with pytest.raises(DataError, match=r"set cannot be packed \(.*No space left on device\)"):
        pack_folder(source, tmp_path / "out" / "set")
    assert not list((tmp_path / "out").iterdir())


def test_the_folder_in_which_one_stands_can_be_the_target(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert pack_folder(source, Path())
    assert read_manifest(tmp_path / "here").splits["train"].samples == 14


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.integers(-1, 12)), min_size=1, max_size=60),
    st.floats(0.01, 0.2),
)
def test_a_shard_is_closed_before_it_is_larger_than_asked(sizes: list[tuple[int, int]], megabytes: float) -> None:
    """Every shard is within the limit or holds one sample, and no shard has room for the next sample."""
    samples = [EncodedSample(f"{at:08d}_x", "jpg", label, bytes(size)) for at, (size, label) in enumerate(sizes)]
    pairs = list(packing._assign_shards(iter(enumerate(samples)), None, PackOptions(shard_mb=megabytes), None))  # pyright: ignore[reportArgumentType]
    assert [sample for _, sample in pairs] == samples
    groups = [[sample for number, sample in pairs if number == shard] for shard in range(pairs[-1][0] + 1)]
    assert all(groups)
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        assert _tar_bytes(group) <= megabytes * 1e6 or len(group) == 1
        assert after is None or _tar_bytes([*group, after[0]]) > megabytes * 1e6


def _tar_bytes(samples: Iterable[EncodedSample]) -> int:
    """Size of a tar: per member a header of 512 bytes and full blocks, then two empty blocks; full records."""
    members = [
        data for sample in samples for data in (sample.data, *([str(sample.label)] if sample.label != -1 else []))
    ]
    return -(-(sum(512 + -(-len(data) // 512) * 512 for data in members) + 1024) // 10240) * 10240


def test_the_files_are_as_large_as_reckoned(tmp_path: Path) -> None:
    """Includes the longest key that fits a plain tar header."""
    for count in (1, 5, 9):
        samples = [
            EncodedSample(make_webdataset_key(at, "ä" * 255), "webp", at, bytes(900 * at + 1)) for at in range(count)
        ]
        file = tmp_path / f"{count}.tar"
        packing._write_shard(file, (packing._tar_members(sample, None) for sample in samples))
        assert file.stat().st_size == _tar_bytes(samples)


def test_shards_have_the_size_asked_and_the_bytes_do_not_depend_on_workers(tmp_path: Path, source: Path) -> None:
    for workers in (1, 5):
        pack_folder(source, tmp_path / str(workers), shard_mb=0.01024, workers=workers, val_fraction=0)
    assert contents(tmp_path / "1") == contents(tmp_path / "5")
    shards = read_manifest(tmp_path / "1").splits["train"].shards
    assert len(shards) == 4
    assert {shard.bytes for shard in shards} == {10240}


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=100), st.floats(0, 0.9))
def test_a_division_takes_the_same_share_of_every_label(labels: list[int], fraction: float) -> None:
    """Reference: the first samples of every label in hashed order."""
    given_labels = np.array(labels)
    train, val = split_train_val(given_labels, lambda counts: np.rint(fraction * counts).astype(np.int64))
    order = hashed_order(len(labels)).tolist()
    expected_val: set[int] = set()
    for label in set(labels):
        of_label = [number for number in order if labels[number] == label]
        expected_val |= set(of_label[: round(fraction * len(of_label))])
    assert val.tolist() == [number for number in order if number in expected_val]
    assert train.tolist() == [number for number in order if number not in expected_val]


def test_results_come_in_order_and_are_not_read_far_ahead() -> None:
    consumed: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            consumed.append(number)
            yield number

    results = packing.map_in_order(lambda number: 2 * number, items(), 4, 2)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(consumed) < 10 + 4 * 2
    results.close()
    assert list(packing.map_in_order(str, range(100), 3)) == [str(number) for number in range(100)]


def test_equal_counts_count_what_is_left_out(tmp_path: Path) -> None:
    """If no image of a shard decodes, the other shards keep their samples and file numbers have no gap."""
    good = (tmp_path / "good.png", tmp_path / "bad.png")
    Image.new("RGB", (4, 4)).save(good[0])
    good[1].write_bytes(b"no image")
    files = [good[0], good[0], good[1], good[1], good[0]]
    labels = np.zeros(5, dtype=np.int64)
    pack_split = PackSplit(
        np.arange(5), labels, lambda at: PackSample(f"{at}", "png", 0, files[at].read_bytes, f"number {at}")
    )
    options = PackOptions(samples_per_shard=2, skip_bad=True, workers=2)
    report = packing._PackReport()
    split = packing._write_split(tmp_path, "train", pack_split, options, 0, report)
    assert [(shard.file, shard.samples) for shard in split.shards] == [("train-000000.tar", 2), ("train-000001.tar", 1)]
    assert [line.split("\t")[:2] for line in report.skipped] == [["train", "number 2"], ["train", "number 3"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "gif"}, r"pack: format: input should be 'jpg', 'png' or 'webp' \(given: 'gif'\)"),
        ({"format": "png", "quality": 80}, r"quality=80 is for jpg and webp"),
        ({"shard_mb": 0.0}, r"shard_mb: input should be greater than 0"),
        ({"worker": 2}, r"worker is not a setting. Did you mean 'workers'"),
    ],
)
def test_options_that_cannot_be_are_sentences(
    tmp_path: Path, source: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        pack_folder(source, tmp_path / "out", **options)
