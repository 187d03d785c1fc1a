"""Which member of a sample is its image, and samples that have none, in shards as others write them."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset, open_unchecked_dataset
from foveal.data.format.image_fields import choose_image_fields
from foveal.data.format.shard_index import IndexRules, ShardIndex, mmap_index, write_index
from foveal.data.image.masks import MaskReader
from foveal.data.indexing.index import build_shard_index, index_folder
from foveal.data.loader import train_batches
from foveal.data.sample_images import read_images_by_id, read_sample_images
from foveal.data.sampling.sources import build_training_set
from foveal.data.tools.show import draw_contact_sheet
from foveal.data.tools.verify import verify_dataset
from foveal.errors import DataError

WriteTar = Callable[..., Path]


def encode(kind: str, grey: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8), grey).save(stream, kind)
    return stream.getvalue()


def write_samples(write_tar: WriteTar, folder: Path, fields: str, samples: int = 3, shard: str = "train-0.tar") -> Path:
    """Write samples with these fields; their first byte says which field they are."""
    names = fields.split()
    members = [
        (f"s{row}.{name}", b"0" if name.endswith("cls") else name.encode()) for row in range(samples) for name in names
    ]
    return write_tar(folder / shard, members)


def index(folder: Path, **options: object) -> tuple[ShardIndex, list[str]]:
    """Index a folder; return the index of its first shard and the warnings."""
    warnings: list[str] = []
    index_folder(str(folder), on_warning=warnings.append, **options)  # pyright: ignore[reportArgumentType]
    return mmap_index(folder / "train-0.tar.index")[0], warnings


def image_of(found: ShardIndex, folder: Path, label_field: str | None = None) -> str:
    """Return the field of the first sample's image, which is its content here."""
    offset, size = found.find_image_offset_size(0, label_field)
    return (folder / found.shard).read_bytes()[offset : offset + size].decode()


@pytest.mark.parametrize(
    ("fields", "label_field", "image"),
    [
        ("jpg cls", None, "jpg"),
        ("JPEG cls", None, "jpeg"),
        ("tif png", "png", "tif"),
        ("png tif", "png", "tif"),
        ("tif png", None, "tif"),
        ("tif png", "tif", "png"),
        ("bmp png", "png", "bmp"),
        ("tif gif", "gif", "tif"),
        ("png pgm", "pgm", "png"),
        ("webp png", "png", "webp"),
        ("jpg png", "png", "jpg"),
        ("png jpg", "jpg", "png"),
        ("jpg webp", None, "jpg"),
        ("png depth.png", None, "png"),
        ("jpg seg.png mask.png", "seg.png", "jpg"),
        ("png input.jpg", "png", "input.jpg"),
        ("input.jpg cls", None, "input.jpg"),
        ("input.JPG cls", None, "input.jpg"),
        ("view0.png cls", None, "view0.png"),
        ("img.rgb.jpg img.depth.png cls", None, "img.rgb.jpg"),
        ("input.jpg mask.png gt.png", "gt.png", "input.jpg"),
        ("input.png seg_map.png", None, "input.png"),
    ],
)
def test_the_image_is_never_the_label(
    tmp_path: Path, write_tar: WriteTar, fields: str, label_field: str | None, image: str
) -> None:
    write_samples(write_tar, tmp_path, fields)
    found, _ = index(tmp_path)
    assert image_of(found, tmp_path, label_field).lower() == image


def test_indices_of_earlier_versions_keep_their_order_of_preference(tmp_path: Path, write_tar: WriteTar) -> None:
    """An index without an order has that of 0.1; the digest of its samples, and so a run's science, stays."""
    write_samples(write_tar, tmp_path, "tif png")
    found, _ = index(tmp_path)
    old = replace(found, image_order=1)
    assert image_of(old, tmp_path) == "png"
    assert old.compute_samples_digest() != found.compute_samples_digest()
    file = tmp_path / "train-0.tar.index"
    write_index(old, file)
    assert b"image_order" not in file.read_bytes()
    again, warnings = index(tmp_path)
    assert (again.image_order, image_of(again, tmp_path), image_of(again, tmp_path, "png")) == (1, "png", "tif")
    assert any("3 samples have several images, of which one is read (.png before .tif)" in line for line in warnings)
    faults = verify_dataset(open_unchecked_dataset(str(tmp_path), None), full=True, workers=1)
    assert all("does not decode" in fault for fault in faults), "the headers are those of the index"


def test_metadata_has_new_rules_only_where_they_are_used(tmp_path: Path, write_tar: WriteTar) -> None:
    assert IndexRules().to_metadata() == {"classes": None, "label_key": None, "dotted_keys": False}
    write_samples(write_tar, tmp_path, "jpg png cls")
    found, _ = index(tmp_path)
    assert set(found.to_metadata()) == {"format", "fields", "shard", "bytes", "rules", "note"}
    named, _ = index(tmp_path, image_field="jpg")
    assert named.compute_samples_digest() == found.compute_samples_digest(), "the same images under a stated name"
    other, _ = index(tmp_path, image_field=".PNG")
    assert other.compute_samples_digest() != found.compute_samples_digest()
    assert (image_of(found, tmp_path), image_of(named, tmp_path), image_of(other, tmp_path)) == ("jpg", "jpg", "png")
    assert other.rules["image_field"] == "png"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("left.jpg right.jpg cls", r"sample 's0' has no image, .*: say which member is the image, for .* left.jpg$"),
        (
            "view0.png view1.png",
            r"if keys have dots, index with --dotted-keys, or say which .*--image-field view0.png$",
        ),
        (
            "v2.jpg v2.cls",
            r"the label of 's0' has the name of its image: v2.jpg, v2.cls: if keys have dots, index with ",
        ),
        ("0.jpg 1.jpg json", r"say which member is the image, for example with --image-field 0.jpg$"),
        ("001.jpg", r"sample 's0' has no image, .* 001.jpg: if keys have dots, index with --dotted-keys$"),
        (
            "mask.png cls",
            r"the members of 's0' are: mask.png, cls: if one of them is the image, name it with --image-f",
        ),
        ("json txt", r"none of its 3 samples has an image, the members of 's0' are: json, txt: "),
    ],
)
def test_an_open_question_is_one_sentence_with_its_option(
    tmp_path: Path, write_tar: WriteTar, fields: str, sentence: str
) -> None:
    write_samples(write_tar, tmp_path, fields)
    with pytest.raises(DataError, match=sentence) as caught:
        index(tmp_path)
    if "--image-field " in str(caught.value):
        option = str(caught.value).rpartition("--image-field ")[2].partition(";")[0]
        found, _ = index(tmp_path, image_field=option if "." in option else "mask.png")
        assert len(found) == 3
    elif "--dotted-keys" in str(caught.value):
        assert len(index(tmp_path, dotted_keys=True)[0]) == 3


def test_dotted_keys_and_an_image_with_a_name(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(
        tmp_path / "train-0.tar",
        [("v1.5.input.jpg", b"x"), ("v1.5.cls", b"0"), ("v1.6.input.jpg", b"y"), ("v1.6.cls", b"0")],
    )
    with pytest.raises(
        DataError, match=r"'v1.5.input' is a sample of its own: index without --dotted-keys and with --im"
    ):
        index(tmp_path, dotted_keys=True)
    found, _ = index(tmp_path, dotted_keys=True, image_field="input.jpg")
    assert ([found.key(0), found.key(1)], found.labels.tolist()) == (["v1.5", "v1.6"], [0, 0])


def test_suffixes_of_one_image_may_differ(tmp_path: Path, write_tar: WriteTar) -> None:
    names = ["a.jpg", "b.JPEG", "c.PNG", "d.Tiff"]
    write_tar(tmp_path / "train-0.tar", [(name, b"x") for name in names])
    assert len(index(tmp_path)[0]) == 4
    write_tar(tmp_path / "train-0.tar", [(name.replace(".", ".left."), b"x") for name in names])
    found, warnings = index(tmp_path, rebuild=True)
    assert (len(found), found.fields) == (4, ("left.jpg", "left.jpeg", "left.png", "left.tiff"))
    assert "the image is the member .left.*" in warnings
    assert len(index(tmp_path, image_field="left")[0]) == 4
    assert len(index(tmp_path, image_field="left.jpg")[0]) == 2


def test_shards_with_their_image_in_different_members(tmp_path: Path, write_tar: WriteTar) -> None:
    write_samples(write_tar, tmp_path, "jpg thumb.jpg cls")
    write_samples(write_tar, tmp_path, "thumb.jpg cls", shard="train-1.tar")
    with pytest.raises(
        DataError, match=r"member .jpg in train-0.tar and .thumb.jpg in train-1.tar: index with --image"
    ):
        index(tmp_path)
    found, warnings = index(tmp_path, image_field="jpg")
    assert len(found) == 3
    assert any("train-1.tar: none of its 3 samples has an image" in warning for warning in warnings)
    with pytest.raises(DataError, match=r"none of its 3 samples has an image, .*: correct --image-field"):
        index(tmp_path, image_field="inptu.jpg")


@pytest.mark.parametrize(
    ("fields", "order"), [("jpg webp", ".jpg before .webp"), ("input.jpg png", ".png before .input.jpg")]
)
def test_several_images_are_said(tmp_path: Path, write_tar: WriteTar, fields: str, order: str) -> None:
    write_samples(write_tar, tmp_path, fields)
    said = f"3 samples have several images, of which one is read ({order}): --image-field NAME reads another"
    assert any(said in warning for warning in index(tmp_path)[1])
    assert any(said in warning for warning in index(tmp_path)[1]), "also from the existing index"


@pytest.fixture
def masked(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Three samples of a light TIFF and a dark PNG, the mask."""
    members = [
        (f"s{row}.{name}", encode(kind, grey))
        for row in range(3)
        for name, kind, grey in (("tif", "TIFF", 200), ("png", "PNG", 1))
    ]
    write_tar(tmp_path / "train-0.tar", members)
    index_folder(str(tmp_path), classes=("road", "car"), on_warning=lambda _: None)
    return tmp_path


def read_first_batch(folder: Path, **settings: object) -> np.ndarray:
    tree = {"path": str(folder), "image_size": 8, "channels": 1, "lanes": 1, "mean": [0.5], "std": [0.5], **settings}
    cfg = DataConfig.from_dict(tree, "the test")
    training = build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=3)
    with train_batches(
        training,
        cfg,
        rank=0,
        world_size=1,
        microbatch_size=3,
        start_step=0,
        stop_step=1,
        label_reader=MaskReader("png", ("road", "car"), 255),
    ) as batches:
        return next(batches).images.numpy()


def test_training_reads_the_image_beside_its_mask(masked: Path) -> None:
    found, _ = mmap_index(masked / "train-0.tar.index")
    assert (read_first_batch(masked) > 190).all()
    rewrite_index(masked, replace(found, image_order=1))
    assert (read_first_batch(masked) > 190).all(), "also with an index of 0.1, which prefers the PNG"
    reader = MaskReader("png", ("road", "car"), 255)
    dataset = open_unchecked_dataset(str(masked), None)
    assert verify_dataset(dataset, full=True, workers=1, label_surveys={"train": [reader.make_survey()]}) == []
    assert np.asarray(draw_contact_sheet(dataset, "train", reader)).max() > 190
    cfg = DataConfig(path=str(masked), image_size=8, channels=1)
    assert (read_images_by_id(dataset, cfg, "train", [0, 2], "png").images > 190).all()
    assert (read_sample_images(dataset, cfg, "train", 2, "png").images > 190).all()


def test_a_label_that_is_the_only_picture_is_one_fault_of_verify(tmp_path: Path, write_tar: WriteTar) -> None:
    """The other samples of its shard are still looked at."""
    members = [("a.png", encode("PNG", 1)), ("b.tif", b"no image"), ("b.png", encode("PNG", 1))]
    write_tar(tmp_path / "train-0.tar", members)
    index_folder(str(tmp_path), classes=("road", "car"), on_warning=lambda _: None)
    surveys = {"train": [MaskReader("png", ("road", "car"), 255).make_survey()]}
    faults = verify_dataset(open_unchecked_dataset(str(tmp_path), None), full=True, workers=1, label_surveys=surveys)
    assert [text for text in faults if "sample 'a' has no image beside its label .png" in text]
    assert [text for text in faults if "the image of 'b' does not decode" in text]


def test_a_run_whose_image_was_its_label_is_refused(masked: Path) -> None:
    found, _ = mmap_index(masked / "train-0.tar.index")
    rewrite_index(masked, replace(found, image_order=1))
    with pytest.raises(
        DataError, match=r"data.decode_version=1, .* takes its label .png for its image: start a new run"
    ):
        read_first_batch(masked, decode_version=1)


def test_a_label_without_an_image_beside_it_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    write_samples(write_tar, tmp_path, "png")
    found, _ = index(tmp_path)
    with pytest.raises(
        DataError, match=r"'s0' has no image beside its label .png .*: correct data.label_field, index "
    ):
        found.find_image_offset_size(0, "png")


def rewrite_index(folder: Path, found: ShardIndex) -> None:
    """Replace the only index of a folder, and its digest in the manifest."""
    write_index(found, folder / "train-0.tar.index")
    tree = json.loads((folder / "manifest.json").read_text())
    tree["splits"]["train"]["shards"][0]["index"] = found.compute_samples_digest()
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_choosing_among_fields() -> None:
    assert choose_image_fields(["png", "jpg", "cls"]) == ("jpg", "png")
    assert choose_image_fields(["png", "tif"], order=1) == ("png", "tif")
    assert choose_image_fields(["a.png", "b.png"]) == ()
    assert choose_image_fields(["a.png", "b.png"], label_field="b.png") == ("a.png",)
    assert choose_image_fields(["png"], image_field="png", label_field="png") == ()


def test_one_shard_is_read_by_the_same_rules(tmp_path: Path, write_tar: WriteTar) -> None:
    write_samples(write_tar, tmp_path, "tif png")
    assert build_shard_index(str(tmp_path), "train-0.tar").image_order == 2
