"""Masks and other labels among images: known by their names, asked about, left out and counted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foveal.data.format.manifest import read_manifest
from foveal.data.pack import pack_folder
from foveal.data.pack.record import read_record
from foveal.errors import DataError

Put = Callable[..., Path]


def pack(source: Path, **options: str | None) -> tuple[dict[str, int], tuple[str, ...] | None, str]:
    """Pack a folder; return the samples by split, the classes, and the notes in one text."""
    out = source.with_name("out")
    pack_folder(source, out, **{"val_fraction": 0.0, "labels": "folders", **options})
    record = read_record(out)
    assert record is not None
    manifest = read_manifest(out)
    return (
        {name: split.samples for name, split in manifest.splits.items()},
        manifest.classes,
        "\n".join([*record.summary, *record.notes]),
    )


def names_of(pattern: str) -> list[str]:
    return [pattern.format(number) for number in range(1, 4)]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("benign/benign ({}).png", "benign/benign ({})_mask.png"),
        ("benign/benign ({}).png", "benign/benign ({})_mask_1.png"),
        ("a/TCGA_{}/x_{}.png", "a/TCGA_{}/x_{}_Mask.png"),
        ("a/ISIC_{}.jpg", "a/ISIC_{}_segmentation.png"),
        ("a/{}.png", "a/{}-seg.png"),
        ("a/{}.png", "a/{}.mask.png"),
        ("a/{}.png", "a/{} ground truth.png"),
        ("a/{}.png", "a/mask_{}.png"),
        ("a/image_{}.png", "a/mask_{}.png"),
        ("a/{}_rgb.png", "a/{}_depth.png"),
        ("a/target_{}.png", "a/target_{}_mask.png"),
        ("a/images/x{}.png", "a/masks/y{}.png"),
        ("images/x{}.png", "masks/y{}.png"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        ("Original/{}.png", "Ground Truth/{}.png"),
        ("scans/{}.png", "scans_mask/m{}.png"),
        ("train/cat/{}.jpg", "train_masks/cat/m{}.gif"),
        ("train/images/{}.png", "train/labels/l{}.png"),
        ("scans/{}.png", "masks/{}_mask.png"),
        ("scans/{}.png", "1st_manual/{}_manual1.gif"),
        ("a/{}_json/img.png", "a/{}_json/label.png"),
    ],
)
def test_labels_among_images_are_asked_about(put: Put, images: str, labels: str) -> None:
    source = put("in", *names_of(images.replace("{}", "{0}")), *names_of(labels.replace("{}", "{0}")))
    with pytest.raises(DataError, match=r"3 of 6 images are named as masks .*: state --masks skip .* or --masks pack"):
        pack(source)
    samples, classes, notes = pack(source, masks="skip")
    assert samples == {"train": 3}
    assert classes is not None and len(classes) == 1
    assert "passed over: masks and other labels of images: 3 (" in notes


@pytest.mark.parametrize(
    "names",
    [
        ("with_mask/{}.png", "without_mask/{}.png", "mask_worn_wrong/{}.png"),
        ("NORMAL/IM-{}.jpeg", "PNEUMONIA/IM-{}.jpeg"),
        ("gas_mask/n1_{}.png", "cat/n2_{}.png"),
        ("gas_mask/{}.png", "cat/{}.png", "dog/{}.png"),
        ("mask/mask_{}.png", "no_mask/no_mask_{}.png"),
        ("a/mask_{}.png", "a/x.png", "a/image.png"),
    ],
)
def test_classes_of_such_names_are_classes(put: Put, names: tuple[str, ...]) -> None:
    files = {name for pattern in names for name in names_of(pattern)}
    samples, _, notes = pack(put("in", *files))
    assert samples == {"train": len(files)}
    assert "masks" not in notes


def test_a_folder_of_labels_may_belong_to_several_folders(put: Put) -> None:
    names = ("train/good/{}.png", "test/good/{}.png", "ground_truth/good/{}_mask.png")
    source = put("in", *(name for pattern in names for name in names_of(pattern)))
    assert pack(source, masks="skip")[:2] == ({"train": 3, "test": 3}, ("good",))


def test_the_choice_decides(put: Put) -> None:
    source = put("in", *names_of("images/{}.png"), *names_of("masks/{}.png"))
    with pytest.raises(DataError, match=r"--masks drop: state skip or pack"):
        pack(source, masks="drop")
    assert pack(source, masks="pack")[:2] == ({"train": 6}, ("images", "masks"))
    with pytest.raises(DataError, match=r"packed with other options \(--masks: pack, now skip\)"):
        pack(source, masks="skip")


@pytest.mark.parametrize(("splits", "expected"), [("none", {"train": 6}), ("train=x", {"train": 2})])
def test_stated_folders_are_what_is_stated(put: Put, splits: str, expected: dict[str, int]) -> None:
    source = put("in", "x/cat/1.png", "x/cat/2.png", *names_of("images/{}.png"), "masks/1.png")
    assert pack(source, splits=splits)[0] == expected
