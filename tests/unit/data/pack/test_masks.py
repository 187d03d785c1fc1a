"""Images with masks: which mask is of which image, what is refused, and that a task reads what was packed."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.tasks.registry import find_task
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.image.targets import AppliedCrop
from foveal.data.pack import pack_masks
from foveal.data.pack.record import read_record
from foveal.errors import ConfigError, DataError

CLASSES = ("sky", "road", "car")


def write_image(file: Path, pixels: np.ndarray) -> None:
    """Write an image in the format of its suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def write_pairs(root: Path, images: str, masks: str, ids: tuple[int, ...] = (0, 1, 2), count: int = 3) -> Path:
    """Write images of 6 x 4 pixels and their masks at paths with a number; return the folder."""
    for number in range(count):
        write_image(root / images.format(number), np.full((4, 6, 3), 40 * number, np.uint8))
        write_image(root / masks.format(number), make_ids(number, ids))
    return root


def make_ids(number: int, ids: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """Return ids [4, 6] that tell the number."""
    mask = np.resize(np.array(ids, np.uint8), (4, 6))
    mask[0, 0] = ids[number % len(ids)]
    return mask


def read_masks(folder: Path, split: str = "train") -> dict[str, np.ndarray]:
    """Return the ids of the masks of a split by the image's name, which ends the key."""
    with tarfile.open(folder / f"{split}-000000.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar if member.name.endswith(".mask.png")}
        return {
            name.partition(".")[0].partition("_")[2]: np.asarray(Image.open(io.BytesIO(stream.read())))
            for name, stream in members.items()
            if stream is not None
        }


def pack(source: Path, masks: Path | None = None, **options: object) -> tuple[dict[str, int], str]:
    """Pack with classes and without a held-out part; return the samples by split, and the notes in one text."""
    out = source.with_name(f"{source.name}-out")
    pack_masks(source, out, mask_folder=masks, **{"classes": CLASSES, "val_fraction": 0.0, **options})
    record = read_record(out)
    assert record is not None
    return {name: split.samples for name, split in read_manifest(out).splits.items()}, "\n".join(record.notes)


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/a{}.png", "masks/a{}.png"),
        ("images/a{}.png", "masks/a{}_mask.png"),
        ("images/a{}.png", "masks/a{}_L.png"),
        ("a{}.png", "a{}_mask.png"),
        ("image_{}.png", "mask_{}.png"),
        ("leftImg8bit/x_{}_leftImg8bit.png", "gtFine/x_{}_gtFine_labelIds.png"),
        ("JPEGImages/{}.png", "SegmentationClass/{}.png"),
        ("images/a{}.png", "masks/a{}.tif"),
    ],
)
def test_a_mask_belongs_to_the_image_of_its_name(tmp_path: Path, images: str, masks: str) -> None:
    source = write_pairs(tmp_path / "in", images, masks)
    assert pack(source)[0] == {"train": 3}
    for name, mask in read_masks(tmp_path / "in-out").items():
        assert np.array_equal(mask, make_ids(int(name.replace("leftImg8bit", "").strip("aximge_"))))


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/{}", "masks/{}"),
        ("{}/images", "{}/masks"),
        ("{}", "{}annot"),
        ("{}", "{}_labels"),
        ("leftImg8bit/{}/aachen", "gtFine/{}/aachen"),
    ],
)
def test_folders_of_splits_are_known_in_usual_layouts(tmp_path: Path, images: str, masks: str) -> None:
    for split in ("train", "valid"):
        write_pairs(tmp_path / "in", f"{images.format(split)}/{{}}.png", f"{masks.format(split)}/{{}}.png")
    assert pack(tmp_path / "in")[0] == {"train": 3, "val": 3}


def test_two_folders_can_be_stated(tmp_path: Path) -> None:
    source = write_pairs(tmp_path, "in/{}.png", "in/regions/{}.png")
    assert pack(source / "in", source / "in" / "regions")[0] == {"train": 3}


def test_lists_of_pascal_voc_are_the_splits(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "JPEGImages/{}.png", "SegmentationClass/{}.png")
    write_pairs(source, "JPEGImages/more{}.png", "SegmentationObject/{}.png")
    lists = source / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n")
    (lists / "val.txt").write_text("1\n")
    samples, notes = pack(source)
    assert samples == {"train": 2, "val": 1}
    assert "images that no list in ImageSets/Segmentation names: 3 (" in notes
    assert "masks of instances: 3 (" in notes


def test_images_and_masks_without_each_other_are_asked_about(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "images/a{}.png", "masks/a{}.png")
    write_image(source / "images" / "b.png", np.zeros((4, 6, 3), np.uint8))
    write_image(source / "masks" / "c.png", make_ids(0))
    sentence = r"1 images without mask \(images/b.png\), 1 masks without image \(masks/c.png\): .* --unpaired skip"
    with pytest.raises(DataError, match=sentence):
        pack(source)
    samples, notes = pack(source, unpaired="skip")
    assert samples == {"train": 3}
    assert "images without mask: 1 (b.png); masks without image: 1 (c.png)" in notes
    with pytest.raises(ConfigError, match=r"--unpaired drop: state skip"):
        pack(source, unpaired="drop")


def test_several_masks_of_an_image_are_asked_about(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelIds.png")
    write_pairs(source, "leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_color.png")
    with pytest.raises(DataError, match=r"3 images have several masks.*\*_gtfine_labelids \(3\).*--mask-suffix _gt"):
        pack(source)
    samples, notes = pack(source, mask_suffix="_gtFine_labelIds.png")
    assert samples == {"train": 3}
    assert "masks whose names do not end in _gtFine_labelIds.png: 3" in notes


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (make_ids(0)[:2], r"a1.png has a mask of 6 x 2 pixels and an image of 6 x 4: a mask has the size of its image"),
        (np.full((4, 6), 7, np.uint8), r"a1.png has id 7 in its mask, .*; --ignore-id is the id of ignored pixels"),
        (np.eye(4, 6, dtype=np.uint8) * 255, None),
        (
            np.arange(72, dtype=np.uint8).reshape(4, 6, 3),
            r"a1.png does not decode \(its mask: pixels of mode RGB are not class ids",
        ),
    ],
)
def test_a_mask_that_training_would_refuse_is_refused_by_name(
    tmp_path: Path, mask: np.ndarray, sentence: str | None
) -> None:
    source = write_pairs(tmp_path / "in", "images/a{}.png", "masks/a{}.png")
    write_image(source / "masks" / "a1.png", mask)
    if sentence is None:  # ignored pixels
        assert "no class" in pack(source)[1]
    else:
        with pytest.raises(DataError, match=sentence):
            pack(source)
        assert not source.with_name("in-out").exists()


def test_masks_of_0_and_255_are_explained_and_mapped(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "images/{}.png", "masks/{}.png", ids=(0, 255))
    remedy = r"--classes background,object --map-ids 255=1, or .* 3 of 3 masks hold the ids 0 and 255"
    with pytest.raises(DataError, match=remedy):
        pack(source, classes=None)
    with pytest.raises(
        DataError, match=r"every labelled pixel of 3 masks is of class 'background'.*--map-ids 255=1 does so"
    ):
        pack(source, classes=("background", "object"))
    _, notes = pack(source, classes=("background", "object"), map_ids="255=1")
    assert "ids are stored as others: 255 as 1" in notes
    assert {name: set(mask.ravel()) for name, mask in read_masks(tmp_path / "in-out").items()} == {
        name: {0, 1} for name in "012"
    }
    with pytest.raises(ConfigError, match=r"--map-ids 255: '255' is not ID=ID"):
        pack(source, map_ids="255")


def test_a_grey_mask_in_colour_channels_is_stored_as_grey(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "images/{}.png", "masks/{}.png")
    write_image(source / "masks" / "1.png", np.repeat(make_ids(1)[..., None], 3, axis=2))
    assert "1 masks are of colour channels that are equal: stored as PNG of one channel" in pack(source)[1]
    assert np.array_equal(read_masks(tmp_path / "in-out")["1"], make_ids(1))


def test_masks_are_resized_by_nearest_neighbour_with_their_images(tmp_path: Path) -> None:
    source = tmp_path / "in"
    ids = np.kron(np.array([[0, 2], [1, 255]], np.uint8), np.ones((8, 8), np.uint8))
    write_image(source / "images" / "a.jpg", np.zeros((16, 16, 3), np.uint8))
    write_image(source / "masks" / "a.png", ids)
    pack(source, resize=4)
    mask = read_masks(tmp_path / "in-out")["a"]
    assert np.array_equal(mask, ids[::4, ::4])


def test_segmentation_reads_what_was_packed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_pairs(tmp_path / "in", f"{split}/images/{{}}.png", f"{split}/masks/{{}}.png")
    _, notes = pack(tmp_path / "in")
    cfg = DataConfig.from_dict({"path": str(tmp_path / "in-out"), "image_size": 4}, "the test")
    dataset = Dataset.open(cfg)
    reader = find_task("segmentation").make_label_reader(cfg, dataset)
    assert reader is not None
    assert dataset.classes == CLASSES
    assert set(dataset.manifest.fields) == {"png", "mask.png"}
    with tarfile.open(tmp_path / "in-out" / "val-000000.tar") as tar:
        name = next(name for name in tar.getnames() if name.endswith("_2.mask.png"))
        stream = tar.extractfile(name)
        assert stream is not None
        label = reader.read_label(stream.read(), AppliedCrop.whole_image(6, 4), name)
    assert np.array_equal(label, make_ids(2))
    assert "split 'val': 3 masks: road 35%, car 35%, sky 31%" in notes


def test_another_mask_is_another_source(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", "images/{}.png", "masks/{}.png")
    pack(source)
    pack(source)
    write_image(source / "masks" / "1.png", make_ids(2))
    with pytest.raises(DataError, match=r"has changed since, or is another of this name"):
        pack(source)
