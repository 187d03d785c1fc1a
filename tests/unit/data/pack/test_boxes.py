"""Images with boxes, from COCO's JSON and YOLO's text files: what a task reads of them, and what is refused."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.tasks.registry import find_task
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.format.manifest import read_manifest
from foveal.data.image.targets import AppliedCrop
from foveal.data.pack import pack_coco, pack_yolo
from foveal.data.pack.record import read_record
from foveal.errors import ConfigError, DataError

WIDTH, HEIGHT = 40, 20
Boxes = dict[str, list[list[float]]]


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)


def make_coco(*names: str, boxes: Any = ((0, [2, 4, 10, 8], 3),), **entries: Any) -> dict[str, Any]:
    """Return COCO's tree of images by name, with boxes (image, bbox, category)."""
    images = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(names)]
    annotations = [
        {"id": n, "image_id": image, "bbox": bbox, "category_id": category, "iscrowd": 0}
        for n, (image, bbox, category) in enumerate(boxes)
    ]
    categories = [{"id": 7, "name": "person"}, {"id": 3, "name": "car"}]
    return {"images": images, "annotations": annotations, "categories": categories, **entries}


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a JSON file into in/annotations and returns its path."""

    def write(name: str, tree: Any) -> str:
        file = tmp_path / "in" / "annotations" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tree))
        return str(file)

    return write


def read_boxes(folder: Path, split: str = "train") -> Boxes:
    """Return left, top, right, bottom, class as detection reads them, by the image's name, which ends the key."""
    cfg = DataConfig.from_dict({"path": str(folder), "image_size": 8, "train": split}, "the test")
    reader = find_task("detection").make_label_reader(cfg, Dataset.open(cfg))
    assert reader is not None
    boxes: Boxes = {}
    with tarfile.open(folder / f"{split}-000000.tar") as tar:
        members = {name: tar.extractfile(name) for name in tar.getnames()}
        for name, stream in members.items():
            if name.endswith(".json") and stream is not None:
                image = members[name.replace(".json", ".png")]
                assert image is not None
                crop = AppliedCrop.whole_image(*Image.open(image).size)
                boxes[name.partition(".")[0].partition("_")[2]] = reader.read_label(stream.read(), crop, name).tolist()
    return boxes


def notes_of(folder: Path) -> str:
    record = read_record(folder)
    assert record is not None
    return "\n".join(record.notes)


def counts_of(folder: Path) -> dict[str, int]:
    return {name: split.samples for name, split in read_manifest(folder).splits.items()}


def test_coco_files_are_splits_and_categories_are_classes(tmp_path: Path, coco: Callable[..., str]) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_images(source, "train2017/a.png", "train2017/b.png", "train2017/c.png", "val2017/a.png")
    boxes = [(0, [2, 4, 10, 8], 7), (0, [30, 10, 20, 5.5], 3), (0, [50, 50, 2, 2], 3), (9, [0, 0, 1, 1], 3)]
    files = [
        coco("instances_train2017.json", make_coco("a.png", "b.png", boxes=boxes)),
        coco("instances_val2017.json", make_coco("a.png")),
    ]
    assert pack_coco(source, out, files, workers=1)
    assert not pack_coco(source, out, files)
    assert counts_of(out) == {"train": 2, "val": 1}
    assert read_manifest(out).classes == ("car", "person")
    assert read_boxes(out) == {"a": [[2, 4, 12, 12, 1], [30, 10, 40, 15.5, 0]], "b": []}
    notes = notes_of(out)
    for sentence in (
        "category ids 3 to 7, with gaps, are classes 0 to 1 in their order",
        "split 'train': 1 of 2 images have no box, and train the background",
        "annotations of images that are not listed: 1 (image_id 9); images that no annotation file lists: 1 (c.png)",
        "split 'train': 1 of 3 boxes reach outside their image and are clipped",
        "split 'train': 1 of 3 boxes are wholly outside their image and are left out",
    ):
        assert sentence in notes
    coco("instances_val2017.json", make_coco("a.png", boxes=[(0, [2, 4, 10, 9], 3)]))
    with pytest.raises(DataError, match=r"has changed since"):
        pack_coco(source, out, files)


def test_boxes_and_the_stated_size_are_resized_with_the_image(tmp_path: Path, coco: Callable[..., str]) -> None:
    write_images(tmp_path / "in", "a.png")
    pack_coco(tmp_path / "in", tmp_path / "out", [f"train={coco('x.json', make_coco('a.png'))}"], resize=10)
    assert read_boxes(tmp_path / "out") == {"a": [[1, 2, 6, 6, 0]]}


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (make_coco("a.png", "gone.png"), r"1 of 2 images are not in .*/in \(gone.png\): .* --unpaired skip"),
        (make_coco("a.png", "a.png"), r"two images have the file_name a.png"),
        (make_coco("a.png", boxes=[(0, [1, 1, 2, 2], 4)]), r"has category_id 4, which is no category"),
        (make_coco("a.png", boxes=[(0, [1, 1, -2, 2], 3)]), r"a.png: the box .* has a negative side"),
        (make_coco("a.png", boxes=[(0, None, 3)]), r"has no image_id and bbox of four numbers"),
        (make_coco("a.png", annotations=None), r"has no list 'annotations' of objects"),
        (make_coco("a.png", categories=[{"id": 3, "name": "car"}, {"id": 7, "name": "car"}]), r"'car' comes twice"),
        (
            make_coco("a.png", images=[{"id": 0, "file_name": "a.png", "width": 20, "height": 40}]),
            r"a.png: its annotations are of an image of 20 x 40 pixels, and its image has 40 x 20; these are its sides",
        ),
    ],
)
def test_what_coco_files_lack_is_a_sentence(
    tmp_path: Path, coco: Callable[..., str], tree: dict[str, Any], sentence: str
) -> None:
    write_images(tmp_path / "in", "a.png")
    with pytest.raises(DataError, match=sentence):
        pack_coco(tmp_path / "in", tmp_path / "out", [coco("instances.json", tree)])


def test_images_without_file_are_left_out_if_it_is_said(tmp_path: Path, coco: Callable[..., str]) -> None:
    write_images(tmp_path / "in", "a.png", "b.png")
    file = coco("instances.json", make_coco("a.png", "b.png", "gone.png"))
    pack_coco(tmp_path / "in", tmp_path / "out", [file], unpaired="skip", val_fraction=0.5)
    assert counts_of(tmp_path / "out") == {"train": 1, "val": 1}
    assert "images without file: 1 (gone.png)" in notes_of(tmp_path / "out")


def test_splits_of_coco_files_are_stated_where_names_do_not_say_them(tmp_path: Path, coco: Callable[..., str]) -> None:
    write_images(tmp_path / "in", "a.png", "b.png")
    first, second = coco("x.json", make_coco("a.png")), coco("y.json", make_coco("b.png"))
    with pytest.raises(DataError, match=r"x.json and .*y.json are of no split by their names: .* train="):
        pack_coco(tmp_path / "in", tmp_path / "out", [first, second])
    pack_coco(tmp_path / "in", tmp_path / "out", [f"train={first}", f"val={second}"])
    assert counts_of(tmp_path / "out") == {"train": 1, "val": 1}
    other = coco("y.json", make_coco("b.png", categories=[{"id": 3, "name": "car"}]))
    with pytest.raises(DataError, match=r"have different categories, such as id 7 'person'"):
        pack_coco(tmp_path / "in", tmp_path / "out2", [f"train={first}", f"val={other}"])


def write_labels(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("layout", ["{kind}/{split}/{name}", "{split}/{kind}/{name}"])
@pytest.mark.parametrize("yaml", ["names: [car, person]", "names: {0: car, 1: person}\nnc: 2\npath: ../nowhere", None])
def test_yolo_boxes_are_pixels_of_the_image(tmp_path: Path, layout: str, yaml: str | None) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for split in ("train", "val"):
        write_images(source, *(layout.format(kind="images", split=split, name=f"{name}.png") for name in "ab"))
        text = "1 0.5 0.5 0.5 0.4\n0 0.1 0.1 0.1 0.1\n\n0 0.1 0.1 0.1 0.1\n"
        write_labels(source, {layout.format(kind="labels", split=split, name="a.txt"): text})
    if yaml is None:
        write_labels(source, {"classes.txt": "car\nperson\n"})
    else:
        places = [layout.format(kind="images", split=split, name="") for split in ("train", "val")]
        write_labels(source, {"data.yaml": f"{yaml}\ntrain: {places[0]}\nval: ../{places[1]}\ntest: ../test/images\n"})
    pack_yolo(source, out)
    assert counts_of(out) == {"train": 2, "val": 2}
    assert read_manifest(out).classes == ("car", "person")
    boxes = read_boxes(out, "val")
    assert boxes["b"] == []
    assert boxes["a"] == [pytest.approx([10, 6, 30, 14, 1]), pytest.approx([2, 1, 6, 3, 0])]
    notes = notes_of(out)
    assert "2 images have no file of labels: they are packed without boxes" in notes
    assert "repeated lines of label files: 2 (a.txt)" in notes


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0 0.5 0.5 0.5", r"labels/a.txt, line 2: '0 0.5 0.5 0.5' is not five numbers, class, centre x,"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3", r"line 2: .* is not five numbers, .*; polygons and keypoints are not read"),
        ("car 0.5 0.5 0.5 0.5", r"line 2: 'car 0.5 .* is not five numbers"),
        ("2 0.5 0.5 0.5 0.5", r"line 2: .* has class 2, and classes are 0 to 1"),
        ("0 12 10 20 10", r"line 2: .* has numbers that are not fractions of the image's sides"),
        ("0 nan 0.5 0.5 0.5", r"line 2: .* has numbers that are not fractions"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(tmp_path: Path, line: str, sentence: str) -> None:
    write_images(tmp_path / "in", "images/a.png")
    write_labels(tmp_path / "in", {"labels/a.txt": f"0 0.5 0.5 0.5 0.5\n{line}\n"})
    with pytest.raises(DataError, match=sentence):
        pack_yolo(tmp_path / "in", tmp_path / "out", classes=["car", "person"])


def test_what_a_yolo_folder_lacks_is_a_sentence(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(DataError, match=r"in: no such folder, and no data.yaml"):
        pack_yolo(source, out)
    write_images(source, "images/a.png")
    with pytest.raises(DataError, match=r"no data.yaml and no classes.txt or obj.names, .*: state --classes NAME"):
        pack_yolo(source, out)
    with pytest.raises(DataError, match=r"none of 1 images has a file of labels: .*images/a.png needs .*labels/a.txt"):
        pack_yolo(source, out, classes=["car"])
    write_labels(source, {"labels/a.txt": "0 0.5 0.5 0.5 0.5", "labels/b.txt": ""})
    with pytest.raises(DataError, match=r"labels: 1 files of labels without image \(b.txt\): state --unpaired skip"):
        pack_yolo(source, out, classes=["car"])
    pack_yolo(source, out, classes=["car"], unpaired="skip", val_fraction=0.0)
    assert counts_of(out) == {"train": 1}
    for text, sentence in (
        ("train: gone\nnames: [car]", r"data.yaml: train: gone, and there is no "),
        ("train: images\nnames: {1: car}", r"'names' has the numbers 1: they count from 0"),
        ("train: images\nnames: [car]\nnc: 2", r"says nc: 2 and has 1 names"),
        ("train: images\nnames: [car]\nkpt_shape: [17, 3]", r"describes keypoints"),
    ):
        write_labels(source, {"data.yaml": text})
        with pytest.raises(DataError, match=sentence):
            pack_yolo(source, tmp_path / "out2")
    write_labels(source, {"data.yaml": "train: ["})
    with pytest.raises(ConfigError, match=r"data.yaml: not valid YAML"):
        pack_yolo(source, tmp_path / "out2")
