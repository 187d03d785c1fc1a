"""A pack is whole or not there: killed with SIGKILL, out of room, twice at once; and shards are as large as asked."""

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

# The second shard never ends; the test kills the process when it has begun.
KILLED = """
import sys, time
from pathlib import Path
from foveal.data.pack import pack_folder, write

write_shard = write._write_shard

def stuck(file, samples):
    if file.name != "train-000001.tar":
        return write_shard(file, samples)
    file.write_bytes(b"half a shard")
    print("begun", flush=True)
    time.sleep(1000)

write._write_shard = stuck
pack_folder(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=4)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Noise in two classes, 16 images of 12 x 9 pixels."""
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
    """Every shard is at most as large as asked or holds one sample, and no two neighbours fit into one."""
    samples = [EncodedSample(f"{at:08d}_x", "jpg", label, bytes(size)) for at, (size, label) in enumerate(sizes)]
    pairs = list(packing._assign_shards(iter(enumerate(samples)), None, PackOptions(shard_mb=megabytes)))  # pyright: ignore[reportArgumentType]
    assert [sample for _, sample in pairs] == samples
    groups = [[sample for number, sample in pairs if number == one] for one in range(pairs[-1][0] + 1)]
    assert all(groups)
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        assert _tar_bytes(group) <= megabytes * 1e6 or len(group) == 1
        assert after is None or _tar_bytes([*group, after[0]]) > megabytes * 1e6


def _tar_bytes(samples: Iterable[EncodedSample]) -> int:
    """What tar writes: a header of 512 bytes and whole blocks for each member, two empty blocks, whole records."""
    members = [part for each in samples for part in (each.data, *([str(each.label)] if each.label >= 0 else []))]
    return -(-(sum(512 + -(-len(part) // 512) * 512 for part in members) + 1024) // 10240) * 10240


def test_the_files_are_as_large_as_reckoned(tmp_path: Path) -> None:
    """The longest key included, with which a tar header is still a plain one."""
    for count in (1, 5, 9):
        samples = [
            EncodedSample(make_webdataset_key(at, "ä" * 255), "webp", at, bytes(900 * at + 1)) for at in range(count)
        ]
        file = tmp_path / f"{count}.tar"
        packing._write_shard(file, samples)
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
    """As a slow and obvious division would: of every label, the first ones in hashed order."""
    given_labels = np.array(labels)
    train, val = split_train_val(given_labels, lambda counts: np.rint(fraction * counts).astype(np.int64))
    order = hashed_order(len(labels)).tolist()
    held: set[int] = set()
    for label in set(labels):
        of_label = [number for number in order if labels[number] == label]
        held |= set(of_label[: round(fraction * len(of_label))])
    assert val.tolist() == [number for number in order if number in held]
    assert train.tolist() == [number for number in order if number not in held]


def test_results_come_in_order_and_are_not_read_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = packing.map_in_order(lambda number: 2 * number, items(), 4, 2)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(taken) < 10 + 4 * 2
    results.close()
    assert list(packing.map_in_order(str, range(100), 3)) == [str(number) for number in range(100)]


def test_equal_counts_count_what_is_left_out(tmp_path: Path) -> None:
    """With a shard of which nothing decodes, the others keep their places and their numbers have no hole."""
    good = (tmp_path / "good.png", tmp_path / "bad.png")
    Image.new("RGB", (4, 4)).save(good[0])
    good[1].write_bytes(b"no image")
    files = [good[0], good[0], good[1], good[1], good[0]]
    part = PackSplit(np.arange(5), lambda at: PackSample(f"{at}", "png", 0, files[at].read_bytes, f"number {at}"))
    recipe = PackOptions(samples_per_shard=2, skip_bad=True, workers=2)
    notes = packing._PackNotes()
    split = packing._write_split(tmp_path, "train", part, recipe, 0, notes)
    assert [(shard.file, shard.samples) for shard in split.shards] == [("train-000000.tar", 2), ("train-000001.tar", 1)]
    assert [line.split("\t")[:2] for line in notes.skipped] == [["train", "number 2"], ["train", "number 3"]]


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
