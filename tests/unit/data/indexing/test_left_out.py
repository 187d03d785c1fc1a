"""Members that are no samples: counted, or refused where a label would be lost with them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.data.dataset import open_unchecked_dataset
from foveal.data.format.shard_index import ShardIndex, mmap_index
from foveal.data.indexing.index import index_folder
from foveal.data.tools.verify import verify_dataset
from foveal.errors import DataError

WriteTar = Callable[..., Path]


def index(folder: Path, **options: object) -> tuple[ShardIndex, list[str]]:
    """Index a folder; return the index of its first shard and the warnings."""
    warnings: list[str] = []
    index_folder(str(folder), on_warning=warnings.append, **options)  # pyright: ignore[reportArgumentType]
    return mmap_index(folder / "train-0.tar.index")[0], warnings


@pytest.mark.parametrize(
    ("first", "last"),
    [("README.md", "z.txt"), ("dataset.json", "LICENSE.txt"), ("00.json", "zz.cls"), ("a.mask.png", "Thumbs.db")],
)
def test_samples_without_an_image_are_left_out_and_counted(
    tmp_path: Path, write_tar: WriteTar, first: str, last: str
) -> None:
    samples = [
        (f"s{row}.{name}", b"x" if name == "jpg" else b'{"label": 0}') for row in range(3) for name in ("jpg", "json")
    ]
    write_tar(tmp_path / "train-0.tar", samples)
    plain, _ = index(tmp_path, label_key="label")
    write_tar(tmp_path / "train-0.tar", [(first, b"[not JSON"), *samples, (last, b"cat")])
    found, warnings = index(tmp_path, label_key="label", rebuild=True)
    assert found.compute_samples_digest() == plain.compute_samples_digest()
    assert (found.fields, found.labels.tolist()) == (plain.fields, [0, 0, 0])
    key = first.partition(".")[0]
    said = f"train: samples without an image are left out, 2 in all: train-0.tar 2 (first '{key}')"
    assert said in warnings
    assert said in index(tmp_path, label_key="label")[1], "also from the existing index"
    assert not verify_dataset(open_unchecked_dataset(str(tmp_path), None), full=False, workers=1)


def test_hidden_files_are_passed_over_and_counted(tmp_path: Path, write_tar: WriteTar) -> None:
    hidden = ["._s0.jpg", "a/._s0.jpg", ".DS_Store", "__MACOSX/._s0.jpg", "__MACOSX/a/s0.jpg", "LICENSE"]
    write_tar(
        tmp_path / "train-0.tar", [*((name, b"x") for name in hidden), ("./a/s0.jpg", b"x"), ("./a/s0.cls", b"0")]
    )
    found, warnings = index(tmp_path)
    assert [found.key(row) for row in range(len(found))] == ["./a/s0"]
    assert warnings == ["train: 6 files in shards are passed over: they are hidden, or have no extension"]


def test_a_repeated_key_is_refused_only_with_an_image(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", [("README.md", b"x"), ("a.jpg", b"x"), ("README.md", b"y"), ("b.jpg", b"x")])
    assert len(index(tmp_path)[0]) == 2
    for names in (["a.jpg", "b.jpg", "a.json", "b.json"], ["a.json", "b.jpg", "a.jpg"]):
        write_tar(tmp_path / "train-0.tar", [(name, b"{}") for name in names])
        with pytest.raises(DataError, match=r"key 'a' comes twice, with other samples between \(at bytes 0 and"):
            index(tmp_path, rebuild=True)


def test_the_same_name_in_two_folders_is_two_samples(tmp_path: Path, write_tar: WriteTar) -> None:
    names = ["cat/0.jpg", "cat/0.cls", "dog/0.jpg", "dog/0.cls"]
    write_tar(tmp_path / "train-0.tar", [(name, b"0") for name in names])
    found, _ = index(tmp_path)
    assert [found.key(row) for row in range(2)] == ["cat/0", "dog/0"]


@pytest.mark.parametrize(
    ("names", "dotted", "twin"),
    [
        (["images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b.png"], False, "masks/a"),
        (["JPEGImages/a.jpg", "SegmentationClass/a.png", "JPEGImages/b.jpg", "SegmentationClass/b.png"], False, "Segm"),
        (["a.1.jpg", "a.1.target.png", "b.1.jpg", "b.1.target.png"], True, "a.1.target"),
        (["imgs/a.jpg", "lbls/a.png", "imgs/b.jpg", "lbls/b.png"], False, "lbls/a"),
        (["d/images/train/a.jpg", "d/images/train/b.jpg", "d/masks/train/a.png", "d/masks/train/b.png"], False, "d/m"),
        (["masks/images/a.jpg", "masks/images/b.jpg", "masks/gt/a.png", "masks/gt/b.png"], False, "masks/gt/a"),
        (["train/a.jpg", "train/b.jpg", "train_masks/a_mask.gif", "train_masks/b_mask.gif"], False, "train_masks/a_ma"),
        (["a.jpg", "a_mask.png", "b.jpg", "b_mask.png"], False, "a_mask"),
        (["a.jpg", "b.jpg", "a-seg.png", "b-seg.png"], False, "a-seg"),
        (["benign (1).png", "benign (1)_mask.png", "benign (1)_mask_1.png"], False, "benign (1)_mask"),
        (["a_0_leftImg8bit.png", "a_0_gtFine_labelIds.png", "a_0_gtFine_color.png"], False, "a_0_gtFine_labelIds"),
        (["0_depth.png", "0_rgb.png", "1_depth.png", "1_rgb.png"], False, "0_depth"),
        (["image_0.png", "image_1.png", "mask_0.png", "mask_1.png"], False, "mask_0"),
        (["im0.png", "im1.png", "gt0.png", "gt1.png"], False, "gt0"),
        (["7_sat.jpg", "7_mask.png", "8_sat.jpg", "8_mask.png"], False, "7_mask"),
        (["7/image.jpg", "7/mask.png", "8/image.jpg", "8/mask.png"], False, "7/mask"),
        (["a/x_edge.jpg", "b/y_normal.jpg", "b/z.jpg", "b/z_1.jpg"], False, None),
        (["image_0.jpg", "image_1.jpg", "0_rgb.jpg"], False, None),
        (["a.jpg", "a.cls", "a_mask.jpg", "a_mask.cls"], False, None),
        (["sick/0.jpg", "sick/0.cls", "normal/0.jpg", "normal/0.cls"], False, None),
        (["sick/0.jpg", "normal/0.jpg", "sick/1.jpg", "normal/1.jpg"], False, None),
        (["rgb/0.jpg", "normal/0.jpg", "rgb/1.jpg", "normal/1.jpg"], False, "normal/0"),
        (["Sick/images/0.png", "Sick/masks/0.png", "Normal/images/0.png", "Normal/masks/0.png"], False, "Sick/masks/0"),
        (["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"], False, None),
        (["mask/0.jpg", "no_mask/0.jpg"], False, None),
        (["a.1.jpg", "a.1.cls", "a.1.5.jpg", "a.1.5.cls"], True, None),
    ],
)
def test_images_that_may_be_labels_of_others_are_said(
    tmp_path: Path, write_tar: WriteTar, names: list[str], dotted: bool, twin: str | None
) -> None:
    write_tar(tmp_path / "train-0.tar", [(name, b"0") for name in names])
    for _ in range(2):
        found, warnings = index(tmp_path, dotted_keys=dotted)
        assert len(found) == sum(not name.endswith("cls") for name in names)
        said = [
            warning for warning in warnings if "2 samples are named as labels of others are, the first is" in warning
        ]
        assert bool(said) == (twin is not None)
        assert not said or f"'{twin}" in said[0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ("jpg jpg.json", "1 of 1 samples have no class; .jpg.json may hold it"),
        ("jpg jpg.cls", "no class; .jpg.cls may"),
        ("jpg label.txt meta.json", "no class; .label.txt, .meta.json may"),
        ("jpg class", "no class; .class may"),
        ("jpg txt", "no class; .txt may"),
        ("jpg json", "no sample has a class of its whole image; .json may"),
        ("jpg label.png", "whole image; .label.png may"),
        ("jpg boxes.json", "whole image; .boxes.json may"),
    ],
)
def test_members_that_may_hold_the_class_are_named(
    tmp_path: Path, write_tar: WriteTar, fields: str, named: str
) -> None:
    write_tar(tmp_path / "train-0.tar", [(f"a.{field}", b"0") for field in fields.split()])
    assert any(named in line for line in index(tmp_path)[1])


def test_a_label_key_without_its_member_names_what_is_there(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.meta.json", b'{"label": 1}')])
    with pytest.raises(
        DataError, match=r"no sample has a member .json, which --label-key reads, .* jpg, meta.json: write"
    ):
        index(tmp_path, label_key="label")
    assert len(index(tmp_path)[0]) == 1


def test_labels_in_a_folder_of_their_own_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    names = ["images/a.jpg", "images/b.jpg", "labels/a.cls", "labels/b.cls"]
    write_tar(tmp_path / "train-0.tar", [(name, b"0") for name in names])
    with pytest.raises(
        DataError, match=r"sample 'labels/a' has no image, .* and the image of that name is in another f"
    ):
        index(tmp_path)
    write_tar(
        tmp_path / "train-0.tar", [(name, b"0") for name in ["cat/0.jpg", "cat/1.jpg", "dog/0.json", "dog/1.jpg"]]
    )
    assert len(index(tmp_path)[0]) == 3, "a lost image of a class with numbered files"


def test_keys_in_two_unicode_forms_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_tar(tmp_path / "train-0.tar", [(f"{composed}.jpg", b"x"), (f"{decomposed}.cls", b"0")])
    with pytest.raises(DataError, match=r"its key is that of another sample in another Unicode form \(NFC, NFD\)"):
        index(tmp_path)
    write_tar(tmp_path / "train-0.tar", [(f"{decomposed}.jpg", b"x"), (f"{decomposed}.cls", b"0")])
    assert index(tmp_path)[0].labels.tolist() == [0]
