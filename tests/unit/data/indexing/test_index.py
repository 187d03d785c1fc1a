"""Indices of foreign shards: the offsets of tarfile, and a one-line error for every broken shard."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.format.shard_index import ShardIndex, mmap_index, open_index, verify_index, write_index
from foveal.data.indexing.index import build_shard_index, index_folder
from foveal.data.loader import eval_batches
from foveal.errors import DataError

WriteTar = Callable[..., Path]


def test_offsets_are_those_of_tarfile(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    members = [
        ("a/0.png", png),
        ("a/0.cls", b"3"),
        ("b.1/0.CLS", b"12\n"),
        ("b.1/0.seg.png", b"mask"),
        ("b.1/0.png", png),
    ]
    shard = write_tar(tmp_path / "train-0.tar", members)
    index = build_shard_index(str(tmp_path), shard.name)
    assert index.fields == ("png", "cls", "seg.png")
    assert [index.key(row) for row in range(len(index))] == ["a/0", "b.1/0"]
    assert index.labels.tolist() == [3, 12]
    data = shard.read_bytes()
    for row, stem in enumerate(("a/0", "b.1/0")):
        for column, field in enumerate(index.fields):
            expected = {name.lower(): content for name, content in members}.get(f"{stem}.{field}")
            offset, size = index.offsets[row, column], index.sizes[row, column]
            assert (None if size < 0 else data[offset : offset + size]) == expected
    assert index.find_image_offset_size(1) == (index.offsets[1, 0], len(png))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_keys(tmp_path: Path, png: bytes, kind: int) -> None:
    key = "/".join(["a-long-folder-name-é"] * 20)
    with tarfile.open(tmp_path / "train-0.tar", "w", format=kind) as tar:
        for name, data in ((f"{key}.png", png), (f"{key}.cls", b"1")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    index = build_shard_index(str(tmp_path), "train-0.tar")
    assert index.key(0) == key
    offset, size = index.find_image_offset_size(0)
    assert (tmp_path / "train-0.tar").read_bytes()[offset : offset + size] == png


def test_names_are_data_and_never_paths(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    write_tar(tmp_path / "train-0.tar", [("../../escape.png", png), ("/etc/passwd.png", png)])
    index = build_shard_index(str(tmp_path), "train-0.tar")
    assert [index.key(0), index.key(1)] == ["../../escape", "/etc/passwd"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["train-0.tar"]


def test_what_webdataset_skips_is_skipped(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    members = [("README", b"x"), ("._0.png", b"x"), ("__meta__/a.json", b"{}"), ("0.png", png), ("notes", b"x")]
    write_tar(tmp_path / "train-0.tar", members)
    index = build_shard_index(str(tmp_path), "train-0.tar")
    assert (len(index), index.fields) == (1, ("png",))


def test_the_tar_of_the_system_can_be_indexed(tmp_path: Path, png: bytes) -> None:
    """`tar` adds directories, a leading `./` and padding to another block size."""
    (tmp_path / "images").mkdir()
    for name in ("0001", "0002"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png)
        (tmp_path / "images" / f"{name}.cls").write_text("7")
    subprocess.run(
        ["tar", "-b", "128", "--sort=name", "-cf", "train-0.tar", "./images"], cwd=tmp_path, check=True, env=os.environ
    )
    index = build_shard_index(str(tmp_path), "train-0.tar")
    assert [index.key(row) for row in range(2)] == ["./images/0001", "./images/0002"]
    assert index.labels.tolist() == [7, 7]


def test_an_index_file_is_safetensors_and_reads_back_mapped(tmp_path: Path, digits: Path) -> None:
    index = build_shard_index(str(digits), "train-000000.tar")
    write_index(index, tmp_path / "x.index")
    mapped = open_index(tmp_path / "x.index", index.compute_samples_digest(), len(index))
    stored = safetensors.numpy.load_file(tmp_path / "x.index")
    for name in ("offsets", "sizes", "labels", "key_ends", "keys"):
        assert np.array_equal(getattr(mapped, name), getattr(index, name))
        assert np.array_equal(getattr(mapped, name), stored[name])
        assert not getattr(mapped, name).flags.owndata
    assert (mapped.shard, mapped.bytes, mapped.fields) == ("train-000000.tar", index.bytes, ("cls", "png"))
    assert mapped.key(239) == index.key(239)


def test_the_digest_knows_keys_sizes_and_labels_and_not_places(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    def digest(*members: tuple[str, bytes]) -> str:
        write_tar(tmp_path / "train-0.tar", members)
        return build_shard_index(str(tmp_path), "train-0.tar").compute_samples_digest()

    base = digest(("a.png", png), ("a.cls", b"1"))
    assert digest(("skipped", b"x" * 2000), ("a.png", png), ("a.cls", b"1")) == base
    different = [
        digest(("b.png", png), ("b.cls", b"1")),
        digest(("a.png", png), ("a.cls", b"2")),
        digest(("a.png", png + b"\0"), ("a.cls", b"1")),
        digest(("a.png", png)),
    ]
    assert len({base, *different}) == 5


def test_shards_are_grouped_by_name_and_ordered_by_number(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    for name in ("train-10", "train-9", "val_0", "train-extra-000001", "00003"):
        write_tar(tmp_path / f"{name}.tar", [("a.png", png)])
    manifest = index_folder(str(tmp_path), name="mine")
    files = {split: [shard.file for shard in entry.shards] for split, entry in manifest.splits.items()}
    assert files == {
        "train": ["00003.tar", "train-9.tar", "train-10.tar"],
        "train-extra": ["train-extra-000001.tar"],
        "val": ["val_0.tar"],
    }
    assert (manifest.name, manifest.fields, manifest.classes, manifest.mean) == ("mine", ("png",), None, None)


def test_class_names_become_labels(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", png), ("a.cls", b"cat"), ("b.png", png), ("b.cls", b"0")])
    manifest = index_folder(str(tmp_path), classes=["dog", "cat"])
    assert manifest.classes == ("dog", "cat")
    assert build_shard_index(str(tmp_path), "train-0.tar", ["dog", "cat"]).labels.tolist() == [1, 0]


def test_indexing_what_is_left_of_a_packed_folder_keeps_names_and_statistics(digits: Path, tmp_path: Path) -> None:
    """The repair proposed for a missing shard must keep class names and statistics, and warn."""
    folder, warnings = tmp_path / "left", []
    shutil.copytree(digits, folder)
    (folder / "train-000001.tar").unlink()
    before = read_manifest(folder)
    manifest = index_folder(str(folder), on_warning=warnings.append)
    assert manifest.splits["train"].samples < before.splits["train"].samples
    assert (manifest.name, manifest.classes, manifest.mean) == (before.name, before.classes, before.mean)
    assert any("was of other samples; its name, class names, mean and std were kept" in warning for warning in warnings)


def test_indexing_a_packed_folder_keeps_what_the_packer_knew(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder)
    cfg = DataConfig.from_dict({"path": str(folder), "image_size": 8, "channels": 1}, "the test")
    packed = Dataset.open(cfg)
    index_folder(str(folder))
    again = Dataset.open(cfg)
    assert again.manifest == packed.manifest
    assert again.manifest.splits["train"].shards[0].sha256 is not None
    shutil.move(folder / "train-000005.tar", folder / "train-000006.tar")
    index_folder(str(folder), folder / "elsewhere")
    renamed = Dataset.open(cfg.model_copy(update={"index": str(folder / "elsewhere")}))
    assert renamed.samples_digest("train") == packed.samples_digest("train")


def test_shards_behind_a_url_read_as_those_in_a_folder(digits: Path, tmp_path: Path) -> None:
    url = f"file://{digits}"
    index_folder(url, tmp_path / "index")
    batches = []
    for path, index in ((url, str(tmp_path / "index")), (str(digits), None)):
        tree = {"path": path, "index": index, "image_size": 8, "channels": 1}
        cfg = DataConfig.from_dict(tree, "the test")
        dataset = Dataset.open(cfg)
        rows = eval_batches(
            dataset, cfg, split="val", subset="all", training_seed=0, rank=0, world_size=1, microbatch_size=360
        )
        batches.append(next(rows))
        rows.close()
    assert batches[0].images.equal(batches[1].images)
    assert batches[0].labels.equal(batches[1].labels)


def write_broken_shard(kind: str, folder: Path, write_tar: WriteTar, png: bytes) -> None:
    shard = folder / "train-0.tar"
    good = [("a.png", png), ("a.cls", b"1"), ("b.png", png), ("b.cls", b"2")]
    members = {
        "twice": [*good, ("a.png", png)],
        "two members": [("a.png", png), ("a.PNG", png)],
        "no image": [("b.json", b"{}"), ("b.cls", b"1")],
        "no samples": [("README", b"x")],
        "key with dots": [("v.1.png", png), ("v.1.cls", b"1"), ("v.2.png", png), ("v.2.cls", b"1")],
        "keys with dots": [("v.1.png", png), ("w.png", png), ("v.2.png", png)],
        "only a mask": [("a.mask.png", png), ("a.cls", b"1")],
        "kinds": [("a.png", png), *((f"a.{number}", b"") for number in range(64))],
        "id": [("a.png", png), ("a.cls", b"1000000")],
        "word": [("a.png", png), ("a.cls", b"cat")],
        "negative": [("a.png", png), ("a.cls", b"-2")],
    }
    data = write_tar(shard, members.get(kind, good)).read_bytes()
    if kind == "gzip inside":
        shard.write_bytes(gzip.compress(data))
    elif kind == "gzip":
        shard.unlink()
        (folder / "train-0.tar.gz").write_bytes(gzip.compress(data))
    elif kind == "zero bytes":
        shard.write_bytes(b"")
    elif kind == "damaged header":
        shard.write_bytes(data[: 512 * 2] + b"x" * 512 + data[512 * 3 :])
    elif kind == "joined":
        shard.write_bytes(data + data)
    elif kind == "no tar":
        shard.write_bytes(b"hello " * 500)
    elif kind == "link":
        with tarfile.open(shard, "w") as tar:
            header = tarfile.TarInfo("a.png")
            header.type, header.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(header)


SENTENCES = {
    "gzip": r"train-0.tar.gz is compressed, which has no random access: unpack it to train-0.tar and index again",
    "gzip inside": r"train-0.tar is compressed \(gzip\), which has no random access: unpack it first",
    "zero bytes": r"train-0.tar is empty \(0 bytes\): delete it, or write it again",
    "no samples": r": none of its 1 shards holds a whole sample: write them again, with members KEY.jpg and K",
    "damaged header": r"train-0.tar is damaged after byte 1024: copy it again",
    "joined": r"train-0.tar holds several archives, the second from byte \d+, .* `tar --ignore-zeros --extract`",
    "no tar": r"train-0.tar is not a tar file",
    "twice": r"key 'a' comes twice, with other samples between \(at bytes 0 and 4096\): write the shard again$",
    "two members": r"key 'a' has two members '.png' \(at bytes 0 and 1024\): write the shard again$",
    "no image": r"none of its 1 samples has an image, the members of 'b' are: json, cls: if one of them is the image, ",
    "key with dots": r"sample 'v' has no image, .* 1.png, 1.cls, 2.png, 2.cls: if keys have dots, index with --dotted",
    "keys with dots": r"key 'v' comes twice, .* \(at bytes 0 and 2048\): if keys have dots, index with --dotted-keys",
    "only a mask": r"none of its 1 samples has an image, .* are: mask.png, cls: if one of them is the image, name it with "
    r"--image-field; otherwise write the shards again$",
    "kinds": r"samples have more than 64 kinds of members: write the shard again$",
    "id": r"the label of 'a' is 1000000, and labels are 0 to 999999",
    "word": r"the label of 'a' is 'cat', not a number: give the names with --classes",
    "negative": r"the label of 'a' is -2, and labels are 0 to 999999",
    "link": r"'a.png' is a link or no plain file: write the shard with `tar --dereference",
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_a_broken_shard_is_one_sentence(tmp_path: Path, write_tar: WriteTar, png: bytes, kind: str) -> None:
    write_broken_shard(kind, tmp_path, write_tar, png)
    with pytest.raises(DataError, match=SENTENCES[kind]) as caught:
        index_folder(str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_an_unpacked_shard_beside_its_gzipped_one_is_fine(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    shard = write_tar(tmp_path / "train-0.tar", [("a.png", png)])
    (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    assert index_folder(str(tmp_path)).splits["train"].samples == 1


def test_labels_outside_the_classes_are_refused(tmp_path: Path, write_tar: WriteTar, png: bytes) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", png), ("a.cls", b"2")])
    with pytest.raises(DataError, match="the label of 'a' is 2, and labels are 0 to 1"):
        index_folder(str(tmp_path), classes=["dog", "cat"])


def test_no_shards_and_no_place_to_write_are_sentences(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(DataError, match=r"no shards \(\*.tar\) here"):
        index_folder(str(tmp_path))
    with pytest.raises(DataError, match=r"nowhere: no folder of shards"):
        index_folder(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"an index cannot be written here .* say with --index FOLDER where it can"):
        index_folder(str(digits), tmp_path / "file")
    with pytest.raises(DataError, match=r"is a URL: say with --index FOLDER"):
        index_folder(f"file://{digits}")


@pytest.mark.parametrize("damage", ["format", "digest", "samples", "rubbish", "empty", "missing"])
def test_an_index_that_does_not_belong_is_refused(tmp_path: Path, digits: Path, damage: str) -> None:
    index = build_shard_index(str(digits), "val-000000.tar")
    file = tmp_path / "val-000000.tar.index"
    write_index(index, file)
    digest, samples = index.compute_samples_digest(), len(index)
    if damage == "format":
        file.write_bytes(file.read_bytes().replace(b'"format\\": 2', b'"format\\": 1'))
    elif damage == "digest":
        digest = "0" * 64
    elif damage == "samples":
        samples += 1
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"rubbish" * 30 if damage == "rubbish" else b"")
    with pytest.raises(DataError, match=r"val-000000.tar.index .*: run `foveal data index .*` again$"):
        open_index(file, digest, samples)


def test_every_byte_of_an_index_is_covered(tmp_path: Path, digits: Path) -> None:
    """A changed byte is refused, or is in padding and does not change the index."""
    file = tmp_path / "val-000000.tar.index"
    index = build_shard_index(str(digits), "val-000000.tar")
    write_index(index, file)
    verify_index(file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for position in [*range(0, start, 3), *range(start, len(data), 211), len(data) - 1]:
        file.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            verify_index(file)
        except DataError:
            refused += 1
        else:
            changed, digest = mmap_index(file)
            assert (changed.to_metadata(), digest, changed.checksum) == (
                index.to_metadata(),
                index.compute_samples_digest(),
                index.compute_checksum(),
            )
            assert position < start, "a changed byte of the arrays was not detected"
    assert refused > len(range(0, start, 3)) * 0.9
    file.write_bytes(data[:-8])
    with pytest.raises(DataError, match="is no index of a shard"):
        verify_index(file)


def test_a_sample_without_an_image_is_named() -> None:
    none = np.full((1, 1), -1)
    index = ShardIndex("s.tar", 1, ("png",), none, none, np.array([0]), np.array([1]), np.frombuffer(b"k", "u1"))
    with pytest.raises(DataError, match=r"s.tar: sample 'k' has no image"):
        index.find_image_offset_size(0)
