"""Folders of images: which sub-folders are splits, which are classes, and what is passed over."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.pack import pack_folder
from foveal.data.pack.record import read_record
from foveal.errors import DataError

Put = Callable[..., Path]
Counts = dict[str, dict[str, int]]

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def classes_of(*folders: str, names: tuple[str, ...] = ("cat", "dog")) -> list[str]:
    """Return paths of two images per class in every folder."""
    return [f"{folder}/{name}/{number}.png" for folder in folders for name in names for number in range(2)]


def pack(source: Path, **options: str | float) -> tuple[Counts, str]:
    """Pack a folder; return the samples by split and class, or 'no label', and the notes in one text."""
    out = source.with_name(f"{source.name}-out")
    assert pack_folder(source, out, **{"val_fraction": 0.0, **options})
    first_split = next(iter(read_manifest(out).splits))
    dataset = Dataset.open(DataConfig.from_dict({"path": str(out), "image_size": 2, "train": first_split}, "the test"))
    record = read_record(out)
    assert record is not None
    counts: Counts = {}
    for split in dataset.manifest.splits:
        labels = dataset.shard_index(split, 0).labels.tolist()
        class_names = dict(enumerate(dataset.classes or ()))
        names = [class_names.get(label, "no label") for label in labels]
        counts[split] = {name: names.count(name) for name in sorted(set(names))}
    return counts, "\n".join([*record.summary, *record.notes])


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ("train validation", "train val"),
        ("train valid test", "train val test"),
        ("Training Val Testing", "train val test"),
        ("train2017 val2017", "train val"),
        ("training_set test_set", "train test"),
        ("train dev", "train val"),
        ("train", "train"),
    ],
)
def test_folders_with_usual_names_are_splits(put: Put, folders: str, splits: str) -> None:
    counts, notes = pack(put("in", *classes_of(*folders.split())))
    assert counts == {split: {"cat": 2, "dog": 2} for split in splits.split()}
    pairs = zip(folders.split(), splits.split(), strict=True)
    named = ", ".join(split if split == folder else f"{split} is '{folder}'" for folder, split in pairs)
    assert "splits: " + (f"{named}, by the names of the folders" if len(splits) > 5 else "'train' is the only") in notes


def test_train_alone_is_divided(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of("training")), val_fraction=0.5)
    assert counts == {split: {"cat": 1, "dog": 1} for split in ("train", "val")}
    assert "'training' is the only split: 2 of its images become 'val'" in notes


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (classes_of("train", "val", "valid"), r"'val' and 'valid' both name the split 'val'; state --splits none"),
        (classes_of("train", "Train"), r"folders 'Train' and 'train' both name the split 'train'"),
        (
            [*classes_of("."), "test/0.png"],
            r"'test' names a split, and 'cat', 'dog' beside it do not; state --splits none if",
        ),
        (
            classes_of(".", "train"),
            r"'train' names a split, and 'cat', 'dog' beside it do not; .* --splits train=train ",
        ),
        (classes_of("train", "val", "extra"), r"'train', 'val' name splits, and 'extra' beside it does not"),
        (classes_of("train", "test1"), r"'test1' beside it does not; .* such as --splits train=train,test=test1"),
        (classes_of("val", "test"), r"and there is no 'train'"),
        (classes_of("seg_train", "seg_test"), r"may be splits; .* such as --splits train=seg_train,test=seg_test"),
        (classes_of("data/train", "data/val"), r"in/data has sub-folders that name splits .*: pack \S+in/data, or"),
        (
            [*classes_of("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/0.png"],
            r"'seg_pred', 'seg_test', 'seg_train' may be splits; .* train=seg_train/seg_train,test=seg_test/seg_test,predict=seg_pred/seg_pred ",
        ),
        (classes_of("cifar_train", "cifar_test", "misc"), r"'cifar_test', 'cifar_train' may be splits"),
        (classes_of("x_train", "x_eval"), r"--splits train=x_train,val=x_eval "),
        (["trainA/0.png", "trainB/0.png", "testA/0.png"], r"may be splits"),
        (
            classes_of("train/images", "val/images"),
            r"'images', which holds 'cat', 'dog': state --splits train=train/images,val=val/images if these are .* --labels folders if",
        ),
        (classes_of("root/images/train", "root/images/val"), r"in/root/images has .*: pack \S+in/root/images, or"),
        (classes_of("root/images/x_train", "root/images/x_val"), r"in/root/images has .*: pack \S+in/root/images, or"),
        (["a/b/train/0.png", "a/b/val/0.png", "c/0.png"], r"as in \S+/in/train/a/b, or state .* if 'a' is a class"),
        (
            classes_of("fold_0", "fold_1", "fold_2"),
            r"'fold_0' and 'fold_1' have the same .* 'cat' and 'dog': .* --labels none .* --labels folders .* train=fold_0,val=fold_1,",
        ),
        (["a/cat/0.png", *classes_of("b", "c")], r"folders 'b' and 'c' have the same sub-folders"),
        (classes_of("amazon/images", "dslr/images"), r"--splits train=amazon/images,val=dslr/images"),
        (
            classes_of("train/part1", "train/part2", "val"),
            r"--labels folders if 'part1' and 'part2' are classes; put the",
        ),
        (["a/train/0.png", "a/test/0.png", "b/train/0.png"], r"move the splits up, as in \S+/in/train/a, or"),
        ([*classes_of("train"), "val/0.png"], r"in/val holds 1 images and no class folders, and validation needs"),
        (
            ["train/0.png", "val/cat/0.png"],
            r"'val' has sub-folders of images, and 'train' has none; state --labels none",
        ),
        (
            ["2024/jan/0.png", "2024/feb/1.png", "2023/mar/0.png"],
            r"several levels deep, such as in '2023/mar', .* '2024/jan'; state --labels none .*, or --labels folders if '2023', '2024' are classes",
        ),
        (
            classes_of("dataset"),
            r"--labels folders if 'dataset' is a class .*; pack \S+in/dataset if the folders in it are",
        ),
        (
            [*classes_of("."), "0.png"],
            r"1 image lies directly in 'in', beside folders .*: .*|state --labels none .* leaves out the",
        ),
        ([*classes_of("train"), "train/0.png"], r"1 image lies directly in 'train', beside folders of images; state"),
        (
            [*classes_of("train"), "test/new/0.png", "test/cat/0.png"],
            r"test has classes that \S+in/train lacks: new: .* directly into",
        ),
    ],
)
def test_what_is_doubtful_is_asked(put: Put, names: list[str], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pack(put("in", *names))


@pytest.mark.parametrize(
    ("names", "stated", "expected"),
    [
        ([*classes_of("."), "0.png", "test/0.png"], "none", {"train": {"cat": 2, "dog": 2, "test": 1}}),
        (classes_of("data/train", "data/val"), "none", {"train": {"data": 8}}),
        (
            classes_of("train", "val", "valid"),
            "train=train,val=valid",
            {"train": {"cat": 2, "dog": 2}, "val": {"cat": 2, "dog": 2}},
        ),
        (classes_of("a", "b"), " validation=b, train=A", {"train": {"cat": 2, "dog": 2}, "val": {"cat": 2, "dog": 2}}),
        (
            [*classes_of("train"), "more/0.png"],
            "train=train,extra=more",
            {"train": {"cat": 2, "dog": 2}, "extra": {"no label": 1}},
        ),
        (classes_of("train", "test"), "test=test", {"test": {"cat": 2, "dog": 2}}),
        (classes_of("fold1", "fold2"), "none", {"train": {"fold1": 4, "fold2": 4}}),
        (
            classes_of("train/images", "val/images"),
            "train=train,val=val",
            {"train": {"images": 4}, "val": {"images": 4}},
        ),
        (
            [*classes_of("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/0.png", "seg_train/0.png"],
            "train=seg_train/seg_train,val=./SEG_test/seg_test/,test=seg_pred/seg_pred",
            {"train": {"cat": 2, "dog": 2}, "val": {"cat": 2, "dog": 2}, "test": {"no label": 1}},
        ),
    ],
)
def test_stated_splits_decide(put: Put, names: list[str], stated: str, expected: Counts) -> None:
    labels = {"labels": "folders"} if any("images" in counts for counts in expected.values()) else {}
    counts, notes = pack(put("in", *names), splits=stated, **labels)
    assert counts == expected and list(counts) == list(expected)
    left_out = {"train=train,val=valid": "4 (val)", "test=test": "4 (train)"}.get(stated)
    left_out = "1 (seg_train)" if "seg_train" in stated else left_out
    assert left_out is None or f"images in folders that --splits leaves out: {left_out}" in notes


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ("train=gone", r"--splits train=gone: \S+in has no folder 'gone'; .* there are: 'train', 'val'"),
        ("train", r"'train' is not SPLIT=FOLDER"),
        ("", r"'' is not SPLIT=FOLDER"),
        ("val=train,valid=val", r"'valid=val' repeats a split"),
        ("train=val,val=val", r"'val=val' repeats a split or a folder"),
        ("../up=val", r"'../up' cannot name a split"),
    ],
)
def test_splits_that_cannot_be_are_sentences(put: Put, stated: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pack(put("in", *classes_of("train", "val")), splits=stated)


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        (
            "train=a,val=b",
            r"in/a has one folder only, 'a', .*: state --splits train=a/a,val=b/b if these are the classes, or --labels none",
        ),
        ("train=a", r"state --splits train=a/a if"),
        ("train=a/a,val=b", r"state --splits train=a/a,val=b/b if"),
        ("train=a/a,test=c", r"c has classes that \S+a/a lacks: c: .* state its path, --splits \.\.\.,test=FOLDER/c"),
        ("train=a,val=a/a", r"in/a/a lies in \S+in/a: an image is in one split only"),
        ("train=a/gone", r"has no folder 'a/gone'; .* as FOLDER/SUB_FOLDER"),
        ("train=..", r"has no folder '..'"),
        ("train=/", r"has no folder '/'"),
    ],
)
def test_a_folder_in_a_folder_of_its_name_is_stated_by_its_path(put: Put, stated: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pack(put("in", *classes_of("a/a", "b/b"), "c/c/0.png"), splits=stated)


def test_images_of_a_test_folder_without_classes_have_no_label(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of("train", "val"), "test/0.png", "test/1.png", "test/empty/list.txt"))
    assert counts["test"] == {"no label": 2}
    assert "split 'test': 2 of 2 images have no label" in notes


def test_what_lies_beside_splits_and_classes_is_counted(put: Put) -> None:
    strays = ("a.png", "train/b.png", "train/c.png", "devkit/readme.txt")
    counts, notes = pack(put("in", *classes_of("train", "val"), *strays), labels="folders")
    assert counts == {split: {"cat": 2, "dog": 2} for split in ("train", "val")}
    assert notes.splitlines()[3] == (
        "passed over: files that are no images: 1 (.txt); folders without images beside the splits: 1 (devkit); "
        "images beside the splits: 1 (a.png); images beside class folders: 2 (b.png, c.png)"
    )


def test_one_class_is_noted(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of("dataset"), "stray.png"), labels="folders")
    assert counts == {"train": {"dataset": 4}}
    assert "labels: the folder 'dataset' is the only class; --labels none packs images without labels" in notes
    assert "there is one class only, 'dataset'" in notes
    assert "images beside class folders: 1 (stray.png)" in notes


def test_sub_folders_of_classes_are_noted(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of("a", "b"), "c/0.png"), labels="folders")
    assert counts == {"train": {"a": 4, "b": 4, "c": 1}}
    assert "2 of 3 class folders of 'in' have sub-folders ('cat', 'dog'), whose images belong to the class" in notes


def test_names_in_two_unicode_forms_are_one_class(put: Put) -> None:
    source = put("in", *classes_of("train", names=(NFC, "tea")), *classes_of("val", names=(NFD, "tea")))
    assert pack(source)[0] == {split: {NFC: 2, "tea": 2} for split in ("train", "val")}
    counts, notes = pack(put("both", *classes_of(".", names=(NFC, NFD, "tea"))))
    assert counts == {"train": {NFC: 4, "tea": 2}}
    assert f"class '{NFC}' has several folders" in notes


def test_names_that_differ_in_case_are_kept_apart(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of(".", names=("Cat", "cat", "dog"))))
    assert counts == {"train": {"Cat": 2, "cat": 2, "dog": 2}}
    assert "differ in case only are kept apart: 'Cat' and 'cat'" in notes
    source = put("two", *classes_of("train"), *classes_of("val", names=("Cat", "dog")))
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: Cat: .* upper and lower case"):
        pack(source)


def test_a_name_that_is_not_utf8_is_a_sentence(put: Put) -> None:
    source = put("in", "a/0.png")
    (source / "a").rename(source / b"caf\xe9".decode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"the folder's name is not UTF-8: rename it"):
        pack(source)


def test_an_image_is_packed_once_per_class(put: Put, tmp_path: Path) -> None:
    source = put("in", *classes_of("."))
    put("more", "2.png", "3.png")
    for name in ("more", "again"):
        (source / "dog" / name).symlink_to(tmp_path / "more")
    (source / "cat" / "copy.png").symlink_to("0.png")
    (source / "dog" / "cat.png").symlink_to("../cat/0.png")
    counts, notes = pack(source, labels="folders")
    assert counts == {"train": {"cat": 2, "dog": 5}}
    assert "further links to an image of the same class: 3 (copy.png, 2.png, 3.png)" in notes
    assert "1 images are further links to an image of another class or split, and are packed" in notes


def test_a_split_that_lacks_classes_is_noted(put: Put) -> None:
    counts, notes = pack(put("in", *classes_of("train"), *classes_of("val", names=("dog",))))
    assert counts["val"] == {"dog": 2}
    assert "split 'val' has no image of 1 of 2 classes ('cat')" in notes


def test_hard_links_are_noted(put: Put) -> None:
    source = put("in", *classes_of("."))
    (source / "dog" / "cat.png").hardlink_to(source / "cat" / "0.png")
    counts, notes = pack(source)
    assert counts == {"train": {"cat": 2, "dog": 3}}
    assert "1 images are further names (hard links) of another, and are packed" in notes


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (range(12), "in the order of the names as text, as in torchvision: label 2 is '10'"),
        ((1, 2, 3), "label 0 is '1'"),
        ((0, 1, 2), None),
        (("000", "001", "002"), None),
        (("2", "10", "cat"), None),
    ],
)
def test_numbers_that_are_not_their_labels_are_noted(put: Put, names: Sequence[object], note: str | None) -> None:
    val = f"val/{[*names][1]}/0.png"  # the classes of a further split have their labels from train
    _, notes = pack(put("in", *(f"train/{name}/0.png" for name in names), val))
    assert notes.count("named by numbers") == (note is not None)
    assert note is None or note in notes
