"""Surveys of labels: what many labels together show that none shows alone."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveal.data.image.boxes import BoxReader
from foveal.data.image.class_lists import MultiLabelReader
from foveal.data.image.decode import UndecodableError
from foveal.data.image.masks import MaskReader
from foveal.data.image.targets import AppliedCrop, LabelReader, LabelSurvey
from foveal.errors import DataError

SIDE = 40
CROP = AppliedCrop.whole_image(SIDE, SIDE)


def encode_mask(ids: Any, format_name: str = "PNG", dtype: type = np.uint8) -> bytes:
    array = np.zeros((SIDE, SIDE), dtype)
    array[: SIDE // 2] = ids[0]
    array[SIDE // 2 :] = np.resize(ids, SIDE)
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format_name)
    return stream.getvalue()


def survey(reader: LabelReader, labels: Sequence[bytes]) -> LabelSurvey:
    result = reader.make_survey()
    for number, data in enumerate(labels):
        result.add(data, (SIDE, SIDE), f"sample '{number}'")
    return result


def said(reader: LabelReader, labels: Sequence[Any], *, is_complete: bool = True) -> list[tuple[str, str]]:
    encoded = [label if isinstance(label, bytes) else json.dumps(label).encode() for label in labels]
    findings = survey(reader, encoded).findings(is_complete=is_complete)
    return [(finding.severity, finding.sentence) for finding in findings]


def masks(*names: str, ignore_id: int | None = 255) -> MaskReader:
    return MaskReader("mask.png", names, ignore_id)


@pytest.mark.parametrize(
    ("names", "ids", "severity", "sentence"),
    [
        ("ab", [0, 255], "fault", "every labelled pixel of 1 masks is of class 'a' (id 0), and 25% of the pixels have"),
        ("abc", [0, 255], "fault", "in masks of 0 and 255 a 1; data.ignore_id is for pixels without a label"),
        ("ab", [1, 255], "untrainable", "every labelled pixel of 1 masks is of class 'b' (id 1)"),
        ("ab", [0], "untrainable", "every pixel of 1 masks is of class 'a' (id 0)"),
        ("ab", [255], "untrainable", "no pixel of 1 masks has a class, all have the id of data.ignore_id=255"),
        (
            "abc",
            [1, 2],
            "note",
            "class 'a': in none of 1 masks; mask ids count from 0, in the order of the class names",
        ),
        ("abc", [0, 1], "note", "class 'c': in none of 1 masks"),
        ("ab", [255, 255, 255, 0, 1], "note", "of the pixels of 1 masks have the id of data.ignore_id=255"),
    ],
)
def test_masks(names: str, ids: list[int], severity: str, sentence: str) -> None:
    (found,) = said(masks(*names), [encode_mask(ids)])
    assert found[0] == severity
    assert sentence in found[1]


def test_masks_that_are_right_are_counted() -> None:
    reader = masks("a", "b")
    assert said(reader, [encode_mask([0, 1, 255]), encode_mask([1])]) == [], "a border of 255, as in VOC"
    assert survey(reader, [encode_mask([0, 1, 255])]).summary() == "1 masks: a 68%, b 16%, no class 16%"
    many = masks(*"abcdefg")
    assert survey(many, [encode_mask(range(7))]).summary().endswith("c 8%, d 8%, 3 more")


def test_masks_some_of_which_were_read_are_in_doubt() -> None:
    """Rare objects may be in none of the masks that were read first."""
    reader = masks("a", "b")
    assert said(reader, [encode_mask([0])], is_complete=False)[0][0] == "note"
    assert survey(reader, [encode_mask([0])]).needs_more()
    assert not survey(reader, [encode_mask([0, 1])]).needs_more()


def test_an_ignored_class_and_empty_masks_are_said() -> None:
    found = said(masks("a", "b", "c", ignore_id=0), [encode_mask([1, 2, 0]), encode_mask([0])])
    assert ("note", "1 of 2 masks have no pixel of a class, only the id of data.ignore_id=0") in found
    assert ("note", "pixels of class 'a' are ignored: data.ignore_id=0 is its id") in found


@pytest.mark.parametrize(
    ("names", "ids", "format_name", "sentence"),
    [
        (
            "ab",
            [0, 255],
            "PNG",
            "id 255 in its mask, and there are 2 classes with ids 0 to 1; a mask of 0 and 255 alone",
        ),
        ("ab", [255], "PNG", "a mask of 255 alone looks binary: write 1 in place of 255 if that is a class"),
        ("abc", [0, 200], "PNG", "a mask of 0 and 200 alone looks binary"),
        ("abc", [0, 2, 3], "PNG", "with ids 0 to 2: state data.ignore_id=3 if its pixels have no class"),
        ("abc", [1, 2, 3], "PNG", "name id 0 too with `foveal data index --classes`, or write every id less 1"),
        (
            "ab",
            range(0, 200, 9),
            "PNG",
            "it has 23 ids: a mask that was resized with interpolation has ids of no class",
        ),
        ("abc", [0, 100, 200], "PNG", "its ids look multiplied by 100, as for viewing: divide them"),
        ("abc", [0, 2, 77], "PNG", "with ids 0 to 2; data.ignore_id is the id of ignored pixels"),
    ],
)
def test_a_mask_with_an_id_of_no_class(names: str, ids: Any, format_name: str, sentence: str) -> None:
    with pytest.raises(DataError, match="sample 'x' has id ") as caught:
        masks(*names, ignore_id=None).read_label(encode_mask(list(ids), format_name), CROP, "sample 'x'")
    assert sentence in str(caught.value)


def test_negative_ids_are_refused() -> None:
    with pytest.raises(DataError, match="has id -7 in its mask, and the ids of classes count from 0"):
        masks("a").read_label(encode_mask([0, -7], "TIFF", np.int32), CROP, "here")


def test_labels_that_do_not_decode_keep_their_reason() -> None:
    colour = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(colour, "PNG")
    result = masks("a", "b").make_survey()
    for name in ("x", "y"):
        with pytest.raises(UndecodableError):
            result.add(colour.getvalue(), (SIDE, SIDE), name)
    (finding,) = result.findings(is_complete=True)
    assert finding.severity == "fault"
    assert finding.sentence.startswith("2 of 2 masks do not decode, the first: x: its mask: pixels of mode RGB")


# --- lists of classes ---


@pytest.mark.parametrize(
    ("names", "label", "sentence"),
    [
        ("abc", [1, 0, 1], "has the labels [1, 0, 1], which look one-hot: a value for each of the 3 classes"),
        ("abc", [1, 0, 1], "write [0, 2] in its .json"),
        ("abc", [True, False, False], "which look one-hot"),
        ("abc", [0.0, 1.0, 1.0], "which look one-hot"),
        ("ab", [1, 1], "which look one-hot"),
        ("ab", [0, 0], "write [] in its .json"),
        ("ab", [1.0, 0.0], "which look one-hot"),
        ("a", [1], "which look one-hot"),
        ("abc", [2, 2], "hold class 2 ('c') 2 times: a list of classes holds a class once"),
        ("abcd", [1, 0, 1], "hold class 1 ('b') 2 times"),
        ("abc", ["a", 0], "hold class 0 ('a') 2 times"),
        ("abc", ["d"], "has label 'd', and labels are 0 to 2; a list holds the numbers or the names of its classes"),
        ("abc", [0.5], "has label 0.5, and labels are 0 to 2"),
        ("abc", [[0, 1]], "has label [0, 1], and labels are 0 to 2"),
        ("abc", [True], "has label True"),
        ("abc", {"labels": "0 1"}, "nor an object with a list 'labels': its 'labels' is '0 1'"),
        ("abc", {"labels": {"a": 1}}, "its 'labels' is {'a': 1}"),
        ("abc", {"a": 1, "b": 0}, "nor an object with a list 'labels': its entries are 'a', 'b'"),
        ("abc", {}, "'labels': it is empty"),
        ("abc", "a", "'labels': it is 'a'"),
    ],
)
def test_what_is_no_list_of_classes(names: str, label: Any, sentence: str) -> None:
    with pytest.raises(DataError, match="sample 'x'") as caught:
        MultiLabelReader("json", tuple(names)).read_label(json.dumps(label).encode(), CROP, "sample 'x'")
    assert sentence in str(caught.value)


def test_runs_before_0_2_keep_lists_with_repeats() -> None:
    reader = MultiLabelReader("json", ("a", "b", "c"), allows_repeats=True)
    for label, hot in (([1, 0, 1], [1, 1, 0]), ([2, 2], [0, 0, 1])):
        assert reader.read_label(json.dumps(label).encode(), CROP, "x").tolist() == hot
    assert said(reader, [[2, 2], [1, 0, 1]]) == []
    with pytest.raises(DataError, match="look one-hot"):
        reader.read_label(b"[true, false, true]", CROP, "x")


def test_lists_of_numbers_and_names() -> None:
    reader = MultiLabelReader("json", ("a", "b", "c"))
    for label, hot in (([2, 0], [1, 0, 1]), (["c", "a"], [1, 0, 1]), ([], [0, 0, 0]), ([0, 1, 2], [1, 1, 1])):
        assert reader.read_label(json.dumps(label).encode(), CROP, "x").tolist() == hot
    two = MultiLabelReader("json", ("a", "b"))
    assert two.read_label(b"[0, 1]", CROP, "x").tolist() == [1, 1]


@pytest.mark.parametrize(
    ("names", "labels", "severity", "sentence"),
    [
        ("ab", [[0, 1], [1, 0]], "fault", "all of 2 lists of classes are [0, 1] or [1, 0], which look one-hot"),
        ("ab", [[0, 1], [0, 1]], "untrainable", "each of 2 lists of classes holds all classes, 'a', 'b'"),
        ("ab", [[], []], "untrainable", "none of 2 lists of classes holds a class"),
        ("abc", [[0], [2]], "note", "class 'b': in none of 2 lists of classes"),
    ],
)
def test_lists_together(names: str, labels: list[Any], severity: str, sentence: str) -> None:
    ((found, text),) = said(MultiLabelReader("json", tuple(names)), labels)
    assert (found, sentence in text) == (severity, True), text


def test_lists_of_both_classes_among_others_are_lists_of_classes() -> None:
    assert said(MultiLabelReader("json", ("a", "b")), [[0, 1], [1, 0], [0]]) == []
    assert said(MultiLabelReader("json", ("a",)), [[0], [0]]) == [], "one class may be in every image"


# --- boxes ---


def box(*bbox: float, label: Any = 0, **further: Any) -> dict[str, Any]:
    return {"bbox": list(bbox), "category_id": label, **further}


BOXES = BoxReader("json", ("a", "b"))
GOOD = [box(1, 2, 9, 9, label=0), box(5, 5, 3, 30, label=1), box(3, 3, 2, 2), box(8, 8, 9, 9)]


def test_boxes_without_area_and_outside_are_left_out_and_counted() -> None:
    odd = [
        box(4, 5, 5.5, 0.0),
        box(4, 5, 0, 3),
        box(30, 30, 20, 20, label=1),
        box(99, 99, 5, 5),
        box(0, 0, 40, 40, iscrowd=1, label=7),
        box(-9, 5, 9, 5),
    ]
    label = BOXES.read_label(json.dumps(odd).encode(), CROP, "x")
    assert label.tolist() == [[30, 30, 40, 40, 1]], "reaching outside is clipped"
    assert said(BOXES, [GOOD, odd]) == [
        ("note", "1 of 10 boxes reach outside their image and are clipped"),
        ("note", "2 of 10 boxes are wholly outside their image and are left out"),
        ("note", "2 of 10 boxes have no area and are left out"),
        ("note", "1 of 10 boxes are crowds and are left out"),
    ]
    assert said(BOXES, [[*GOOD, box(30, 30, 10.9, 10.5)]]) == [], "annotators round"


@pytest.mark.parametrize(
    ("boxes", "severity", "sentence"),
    [
        (
            [box(0.1, 0.2, 0.5, 0.5)],
            "fault",
            "all numbers of 1 boxes are within 0 and 1, as frac",
        ),
        (
            [box(20, 20, 39, 39), box(10, 10, 35, 20), box(1, 1, 9, 9), box(2, 2, 30, 9)],
            "fault",
            "left, top, width, height in pixels: these look like left, top, right, bottom",
        ),
        ([box(30, 30, 20, 20)] * 3 + [box(1, 1, 5, 5)], "fault", "3 of 4 boxes reach outside their image, and bbox is"),
        ([box(4, 5, 0, 3)], "untrainable", "none of 1 lists of boxes has a box to learn"),
        ([], "untrainable", "none of 1 lists of boxes has a box to learn"),
        ([box(1, 1, 5, 5, label=1)], "note", "class 'a': in none of 1 boxes; category ids count from 0, in the order"),
    ],
)
def test_boxes_together(boxes: list[Any], severity: str, sentence: str) -> None:
    found, text = said(BOXES, [boxes])[0]
    assert (found, sentence in text) == (severity, True), text


@pytest.mark.parametrize(
    ("annotation", "sentence"),
    [
        (box(1, 1, -5, 5), "has a negative side: bbox is left, top, width, height in pixels"),
        (
            box(1, 1, 5, 5, label=2),
            "category_id is the place of the class in the list of names, from 0 (COCO's own ids",
        ),
        (box(1, 1, 5, 5, label="c"), "has label 'c', and labels are 0 to 1; category_id is the number or the name"),
        (box(1, 1, 5, 5, 5), "is no box with bbox and category_id as in COCO"),
    ],
)
def test_what_is_no_box(annotation: Any, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        BOXES.read_label(json.dumps([annotation]).encode(), CROP, "x")
    assert sentence in str(caught.value)


FRACTIONS = [box(0.1, 0.2, 0.5, 0.5), box(0.5, 0.5, 0.4, 1)]
ONE = [box(1, 2, 9, 9, image_id=1)]
WIDE = AppliedCrop.whole_image(40, 20)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (FRACTIONS, "all numbers of its 2 boxes are within 0 and 1, as fractions of the image, and bbox is left, top"),
        ([*ONE, box(1, 2, 9, 9, image_id=2)], "its annotations are of 2 images, with image_id '1', '2'"),
        (
            {"annotations": [*ONE, box(1, 2, 9, 9, image_id="2")], "images": [{"id": 1}, {"id": 2}]},
            "its annotations are of 2 images",
        ),
        ({"annotations": ONE, "images": [{"id": 3}]}, "its annotations have image_id '1', and its image has id '3'"),
        (
            {"annotations": ONE, "width": 640, "height": 480},
            "of an image of 640 x 480 pixels, and its image has 40 x 20",
        ),
        ({"annotations": ONE, "imageWidth": 80, "imageHeight": 40.0}, "scale its boxes to the image"),
        ({"annotations": ONE, "image": {"width": 20, "height": 40}}, "is turned upright by its EXIF orientation"),
        ({"annotations": [], "size": {"width": 20, "height": 40, "depth": 3}}, "these are its sides exchanged"),
        (
            {"annotations": ONE, "images": [{"id": 2, "width": 40, "height": 20}, {"id": 1, "width": 9, "height": 9}]},
            "of an image of 9 x 9 pixels",
        ),
    ],
)
def test_annotations_of_another_image(value: Any, sentence: str) -> None:
    data = json.dumps(value).encode()
    with pytest.raises(DataError, match="sample 'x': ") as caught:
        BOXES.read_label(data, WIDE, "sample 'x'")
    assert sentence in str(caught.value)
    BoxReader("json", ("a", "b"), decode_version=1).read_label(data, WIDE, "sample 'x'")


@pytest.mark.parametrize(
    "value",
    [
        {"annotations": ONE, "images": [{"id": "1", "width": 40, "height": 20}, {"id": 2, "width": 9, "height": 9}]},
        {"annotations": [box(1, 2, 9, 9, width=9, height=9)], "width": 40.0, "height": 20},
        {"annotations": [box(1, 2, 9, 9)], "images": [{"id": 1, "width": 9, "height": 9}, {"id": 2}], "width": None},
        [box(0, 0, 1, 1), box(0, 0, 1, 1)],
        [box(0, 0, 0.5, 0.5)],
        [box(0, 0, 0.5, 0.5), box(0, 0, 5, 5)],
        [*ONE, box(1, 2, 9, 9)],
    ],
)
def test_annotations_of_their_image(value: Any) -> None:
    BOXES.read_label(json.dumps(value).encode(), WIDE, "x")


def test_a_mask_of_stored_pixels_names_the_orientation_of_its_image() -> None:
    data = encode_mask([0])
    with pytest.raises(DataError, match="40 x 40 pixels and an image of 40 x 20: write its shard again"):
        masks("a", "b").read_label(data, WIDE, "x")
    stream = io.BytesIO()
    Image.new("L", (20, 40)).save(stream, "PNG")
    with pytest.raises(DataError, match=r"image of 40 x 20; these are its sides exchanged.* its EXIF orientation"):
        masks("a", "b").read_label(stream.getvalue(), WIDE, "x")


def test_a_box_may_name_its_class() -> None:
    assert BOXES.read_label(json.dumps([box(1, 1, 5, 5, label="b")]).encode(), CROP, "x")[0, 4] == 1
