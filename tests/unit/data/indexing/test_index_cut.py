"""Truncated tars and damaged headers: complete samples are indexed, and nothing else."""

import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.data.format.shard_index import IndexRules
from foveal.data.indexing.index import build_shard_index, index_folder
from foveal.data.indexing.tar import TarSample, scan_tar
from foveal.errors import DataError

WriteTar = Callable[..., Path]
LONG = "/".join(["a-long-folder-name"] * 9)  # longer than the 100 characters of a plain header


def tar_of(members: list[tuple[str, bytes]], kind: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def scan(data: bytes) -> tuple[list[TarSample], str]:
    return scan_tar(io.BytesIO(data), len(data), "s.tar", IndexRules())[:2]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_of_a_shard_cut_anywhere_the_whole_samples_are_indexed(kind: int) -> None:
    folder = "f" if kind == tarfile.USTAR_FORMAT else LONG
    members = [
        (f"{folder}/{key}.{name}", b"1" * (700 if name == "png" else 1)) for key in "abc" for name in ("png", "cls")
    ]
    tar = tar_of(members, kind)
    samples, note = scan(tar)
    assert (len(samples), note) == (3, "")
    ends = [offset + size for sample in samples for offset, size in sample.offset_size_by_field.values()]
    marked = -(-ends[-1] // 512) * 512 + 512  # a block of zeros after the last member marks the end
    for size in [*range(512, marked + 1, 32), *ends, *(end - 1 for end in ends)]:
        scanned, note = scan(tar[:size])
        complete = sum(end <= size for end in ends[1::2])
        assert scanned == samples[: len(scanned)], "a sample differs from the complete tar's"
        assert complete - (complete == 1) <= len(scanned) <= complete
        assert bool(note) == (size < marked), note
        if note:
            position = note.split("byte ")[1].split(":")[0]
            assert f"s.tar is cut short after byte {position}: its first {len(scanned)}" in note
    for size in range(1, 512, 37):
        with pytest.raises(DataError, match=r"s.tar is not a tar file"):
            scan(tar[:size])


def test_a_last_sample_that_may_miss_members_is_left_out() -> None:
    """A sample cut between its members looks complete; only the fields of the other samples show the loss."""
    fields = {"a": ("png", "cls"), "b": ("png", "cls"), "c": ("png", "cls")}
    members = [(f"{key}.{name}", b"1") for key, names in fields.items() for name in names]
    cut = tar_of(members, tarfile.USTAR_FORMAT)[: 5 * 1024]  # before c.cls
    samples, note = scan(cut)
    assert [sample.key for sample in samples] == ["a", "b"]
    assert "its first 2 samples are indexed, without 'c', which is not known to be whole; copy it again" in note
    samples, note = scan(tar_of(members[:4], tarfile.USTAR_FORMAT)[: 4 * 1024])
    assert [sample.key for sample in samples] == ["a", "b"]
    assert "its first 2 samples are indexed; copy it again" in note


def test_a_cut_shard_is_reported_each_time_and_an_empty_one_left_out(
    tmp_path: Path, write_tar: WriteTar, png: bytes
) -> None:
    members = [(f"{key}.{name}", png if name == "png" else b"0") for key in "abc" for name in ("png", "cls")]
    write_tar(tmp_path / "train-0.tar", members)
    cut = write_tar(tmp_path / "train-1.tar", members).read_bytes()[: 5 * 1024]
    (tmp_path / "train-1.tar").write_bytes(cut)
    write_tar(tmp_path / "train-2.tar", [])
    write_tar(tmp_path / "val-0.tar", [("note", b"x")])
    warning = (
        "is cut short after byte 5120: its first 2 samples are indexed, without 'c', which is not known to be whole; "
        "copy it again, or write it again"
    )
    for _ in range(2):  # the second time from the existing index
        warnings: list[str] = []
        manifest = index_folder(str(tmp_path), on_warning=warnings.append)
        shards = [(shard.file, shard.samples) for shard in manifest.splits["train"].shards]
        assert shards == [("train-0.tar", 3), ("train-1.tar", 2)]
        assert list(manifest.splits) == ["train"]
        assert [line.removeprefix(f"{tmp_path}/") for line in warnings] == [
            f"train-1.tar {warning}",
            "train-2.tar holds no samples: it is left out",
            "val-0.tar holds no samples: it is left out",
        ]
    assert not (tmp_path / "train-2.tar.index").exists()


@settings(max_examples=300)
@given(data=st.data())
def test_rubbish_is_refused_or_is_a_sample_that_tarfile_sees(data: st.DataObject) -> None:
    """Random changed bytes raise DataError or give members inside the file; no hang and no other exception."""
    keys = data.draw(st.lists(st.sampled_from(["a", "b", "dir/c", LONG]), min_size=1, max_size=4, unique=True))
    kind = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    tar = bytearray(tar_of([(f"{key}.{name}", b"1") for key in keys for name in ("png", "cls")], kind))
    used = len(tar.rstrip(b"\0")) + 1
    for position in data.draw(st.lists(st.integers(0, used), max_size=4)):
        tar[position] = data.draw(st.integers(0, 255))
    tar = tar[: data.draw(st.one_of(st.just(len(tar)), st.integers(0, len(tar))))]
    try:
        samples, _ = scan(bytes(tar))
    except DataError:
        return
    for sample in samples:
        for offset, size in sample.offset_size_by_field.values():
            assert 512 <= offset <= offset + size <= len(tar)


def test_a_header_that_claims_less_than_nothing_is_damage() -> None:
    """A negative size would move the scan backwards in an endless loop."""
    tar = bytearray(tar_of([("a.png", b"1"), ("b.png", b"1")], tarfile.GNU_FORMAT))
    header = tar[1024:1536]
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar[1024:1536] = header
    with pytest.raises(DataError, match=r"s.tar is (damaged after byte 1024|not a tar file)"):
        scan(bytes(tar))


def test_a_header_with_a_wrong_sum_is_damage_and_not_the_end() -> None:
    tar = bytearray(tar_of([("a.png", b"1"), ("b.png", b"1")], tarfile.GNU_FORMAT))
    tar[1024 + 100] ^= 1
    with pytest.raises(DataError, match=r"s.tar is damaged after byte 1024: copy it again, or write it again"):
        scan(bytes(tar))


@pytest.mark.parametrize("gap", [0, 1 << 20, (3 << 20) + 100])
@pytest.mark.parametrize("behind", ["archive", "rest"])
def test_what_is_behind_the_end_of_an_archive_is_refused(gap: int, behind: str) -> None:
    """`cat a.tar b.tar`, and a download with a hole: samples behind zeros are not lost without a word."""
    first, second = (tar_of([(f"{key}.png", b"1")], tarfile.GNU_FORMAT) for key in "ab")
    place = len(first) + gap
    joined = first + bytes(gap) + (second if behind == "archive" else second[512:])
    sentence = (
        rf"several archives, the second from byte {place}," if behind == "archive" else "is damaged after byte 1024"
    )
    with pytest.raises(DataError, match=sentence):
        scan(joined)
    assert [sample.key for sample in scan(first + bytes(gap))[0]] == ["a"]


def test_a_sparse_member_is_refused_with_the_option_of_tar(tmp_path: Path, png: bytes) -> None:
    """Its header states the size of the file with its holes, so the tar would seem truncated."""
    with (tmp_path / "a.png").open("wb") as stream:
        stream.write(png)
        stream.seek(1 << 20)
        stream.write(b"x")
    command = ["tar", "--sparse", "--hole-detection=raw", "-C", tmp_path, "-cf", tmp_path / "train-0.tar", "a.png"]
    subprocess.run(command, check=True)
    with pytest.raises(DataError, match=r"'a.png' is stored as a sparse file: write .* without --sparse \(-S\)"):
        build_shard_index(str(tmp_path), "train-0.tar")


def test_an_index_of_a_cut_shard_opens(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    data = write_tar(tmp_path / "train-0.tar", [(f"{key}.png", png) for key in "abcd"]).read_bytes()
    before = build_shard_index(str(tmp_path), "train-0.tar")
    (tmp_path / "train-0.tar").write_bytes(data[: 3 * 1024 + 512])
    after = build_shard_index(str(tmp_path), "train-0.tar")
    assert (len(after), after.bytes) == (3, 3 * 1024 + 512)
    assert np.array_equal(after.offsets, before.offsets[:3])
