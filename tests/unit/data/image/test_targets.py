"""Labels other than a class: cropped like their image, on any ranks; an invalid label is an error message."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.tasks.registry import find_task
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import NO_CLASS
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.errors import DataError

Make = Callable[..., Dataset]
SIDE, SAMPLES, IGNORED = 24, 8, 9
CLASSES = ("sky", "road", "car")


def stripes(number: int) -> np.ndarray:
    """Return ids that vary with the position, with an ignored corner."""
    ids = (np.arange(SIDE)[None, :] // 4 + np.arange(SIDE)[:, None] // 8 + number) % 3
    ids[:4, :4] = IGNORED
    return ids.astype(np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def members(number: int) -> dict[str, bytes]:
    ids = stripes(number)
    boxes = [
        {"bbox": [4, 8, 8, 12], "category_id": number % 3},
        {"bbox": [0, 0, 24, 24], "category_id": 1, "iscrowd": 1},
        {"bbox": [0, 0, 20, 24], "category_id": 1, "iscrowd": True},
    ]
    labels = {"annotations": boxes, "labels": sorted({number % 3, 2})}
    return {"png": png(ids * 20), "mask.png": png(ids), "json": json.dumps(labels).encode()}


@pytest.fixture
def scenes(tmp_path: Path, write_tar: Callable[..., Path]) -> Callable[..., tuple[Dataset, DataConfig]]:
    """Return a factory of (data set, config): each image is its mask times 20; members and settings may be replaced."""

    def make(changed: dict[str, bytes] | None = None, /, **settings: Any) -> tuple[Dataset, DataConfig]:
        rows = [(f"{n:03d}.{name}", data) for n in range(SAMPLES) for name, data in members(n).items()]
        rows = [(name, (changed or {}).get(name, data)) for name, data in rows if (changed or {}).get(name) != b""]
        write_tar(tmp_path / "train-000000.tar", rows)
        index_folder(str(tmp_path), classes=CLASSES, on_warning=lambda _: None)
        tree = {
            "path": str(tmp_path),
            "image_size": SIDE,
            "channels": 1,
            "lanes": 2,
            "val": "train",
            "eval_crop_ratio": 1.0,
        }
        tree |= {"mean": [0.5], "std": [0.5], "ignore_id": IGNORED, "max_bad_fraction": 0.5} | settings
        cfg = DataConfig.from_dict(tree, "the test")
        return Dataset.open(cfg), cfg

    return make


def evaluated(dataset: Dataset, cfg: DataConfig, task: str, world_size: int = 1) -> list[Any]:
    return [
        batch
        for rank in range(world_size)
        for batch in eval_batches(
            dataset,
            cfg,
            split="train",
            subset="all",
            training_seed=0,
            rank=rank,
            world_size=world_size,
            microbatch_size=3,
            label_reader=find_task(task).make_label_reader(cfg, dataset),
        )
    ]


def trained(dataset: Dataset, cfg: DataConfig, task: str) -> list[Any]:
    training = build_training_set(dataset, cfg, seed=0, batch_size=4)
    reader = find_task(task).make_label_reader(cfg, dataset)
    with train_batches(
        training,
        cfg,
        rank=0,
        world_size=1,
        microbatch_size=4,
        start_step=0,
        stop_step=4,
        label_reader=reader,
    ) as batches:
        return list(batches)


def test_a_mask_is_seen_as_its_image_is_seen(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    # The cells of 4 x 4 pixels are flat: away from their edges bilinear resizing keeps image = 20 * mask.
    dataset, cfg = scenes(augment={"scale": [0.3, 1.0], "ratio": [1.0, 1.0], "interpolation": "bilinear"})
    flipped = 0
    for batch in trained(dataset, cfg, "segmentation"):
        assert batch.targets.shape == (4, SIDE, SIDE)
        ids = batch.targets.numpy().astype(int)
        ids[ids == NO_CLASS] = IGNORED
        inside = np.abs(batch.images.numpy()[:, 0].astype(int) - 20 * ids) <= 1
        assert inside.mean() > 0.6, "only edges may differ"
        corner = ids == IGNORED
        flipped += int((corner[:, 0, -1] & ~corner[:, 0, 0]).sum())
    assert flipped, "no image is flipped together with its mask"


def test_an_evaluated_mask_is_whole_on_any_ranks(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes(image_size=12, eval_size=SIDE)
    for world_size in (1, 2):
        batches = evaluated(dataset, cfg, "segmentation", world_size)
        masks = {int(i): mask for b in batches for i, mask in zip(b.ids, b.targets, strict=True)}
        padding = masks.pop(-1, None)
        assert padding is None or (padding == NO_CLASS).all()
        for number in range(SAMPLES):
            ids = stripes(number).astype(int)
            np.testing.assert_array_equal(masks[number].numpy(), np.where(ids == IGNORED, NO_CLASS, ids))


def test_boxes_follow_crop_flip_and_size(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes(image_size=48)
    batch = evaluated(dataset, cfg, "detection")[1]
    assert batch.targets.tolist() == [[[8, 16, 24, 40, n % 3]] for n in (3, 4, 5)], "scaled by 2, without crowds"
    flip_only = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 1.0}
    dataset, cfg = scenes(augment=flip_only)
    assert trained(dataset, cfg, "detection")[0].targets[0, 0, :4].tolist() == [12, 8, 20, 20]
    dataset, cfg = scenes(eval_crop_ratio=0.5)
    assert evaluated(dataset, cfg, "detection")[0].targets[0].tolist() == [[0, 4, 12, 24, 0]], (
        "cropped to 6..18, clipped, scaled by 2"
    )


def test_several_classes(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes()
    assert evaluated(dataset, cfg, "multilabel")[0].targets.tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 1]]


def test_a_mask_that_does_not_decode_is_a_bad_sample(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes({"002.mask.png": png(stripes(2))[:60]})
    batches = evaluated(dataset, cfg, "segmentation")
    assert [bad.webdataset_key for batch in batches for bad in batch.bad_samples] == ["002"]
    assert not batches[0].valid[2]
    assert (batches[0].targets[2] == NO_CLASS).all()
    bad = [bad for batch in trained(dataset, cfg, "segmentation") for bad in batch.bad_samples]
    assert {sample.webdataset_key for sample in bad} == {"002"}
    assert all("its mask" in sample.reason and sample.replacement_key >= 0 for sample in bad)


def test_masks_of_colours_end_a_run_with_their_reason(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes({f"{n:03d}.mask.png": png(np.zeros((SIDE, SIDE, 3), np.uint8)) for n in range(SAMPLES)})
    with pytest.raises(
        DataError, match=r"does not decode, nor does any of .* replace it \(its mask: pixels of mode RGB are"
    ):
        trained(dataset, cfg, "segmentation")


@pytest.mark.parametrize(
    ("task", "member", "data", "sentence"),
    [
        (
            "segmentation",
            "001.mask.png",
            png(np.full((SIDE, SIDE), 7, np.uint8)),
            "id 7 in its mask, and there are 3 classes",
        ),
        (
            "segmentation",
            "001.mask.png",
            png(np.zeros((SIDE, 5), np.uint8)),
            "a mask of 5 x 24 pixels and an image of 24 x 24",
        ),
        ("segmentation", "001.mask.png", b"", "has no member .mask.png"),
        ("detection", "001.json", b'[{"bbox": [9, 0, -2, 5], "category_id": 0}]', "has a negative side"),
        ("detection", "001.json", b'[{"bbox": [2, 0, 3, 5], "category_id": 3}]', "label 3, and labels are 0 to 2"),
        ("detection", "001.json", b'[{"bbox": [2, 0], "category_id": 1}]', "no box with bbox and category_id"),
        ("detection", "001.json", b'[{"bbox": [2, NaN, 3, 5], "category_id": 1}]', "[2.0, nan, 3.0, 5.0]"),
        ("detection", "001.json", b'[{"bbox": [NaN, 2, 3, 5], "category_id": 1}]', "not inside its image"),
        ("detection", "001.json", b'[{"bbox": [2, 0, Infinity, 5], "category_id": 1}]', "not inside its image"),
        ("detection", "001.json", b'[{"bbox": [-Infinity, 0, Infinity, 5], "category_id": 1}]', "not inside its image"),
        ("detection", "001.json", b'[{"bbox": [1%s, 0, 1, 1], "category_id": 1}]' % (b"0" * 400), "no box with bbox"),
        ("detection", "001.json", b'[{"bbox": [2, 0, 3, 5], "category_id": 1, "iscrowd": "no"}]', "has iscrowd 'no'"),
        (
            "detection",
            "001.json",
            b'[{"bbox": [2, 0, 3, 5], "category_id": 1, "iscrowd": null}]',
            "has iscrowd None, which is 0 or 1",
        ),
        ("multilabel", "001.json", b'{"labels": [1, 5]}', "label 5, and labels are 0 to 2"),
        ("multilabel", "001.json", b'{"label": 1}', "nor an object with a list 'labels'"),
    ],
)
def test_what_is_no_label_is_one_sentence(
    scenes: Callable[..., tuple[Dataset, DataConfig]], task: str, member: str, data: bytes, sentence: str
) -> None:
    dataset, cfg = scenes({member: data})
    with pytest.raises(DataError, match="sample '001'") as caught:
        evaluated(dataset, cfg, task)
    assert sentence in str(caught.value)


def test_members_and_names_that_are_not_there(scenes: Callable[..., tuple[Dataset, DataConfig]]) -> None:
    dataset, cfg = scenes(label_field="seg.png")
    with pytest.raises(DataError, match=r"reads members .seg.png, and its samples have png, mask.png, json"):
        evaluated(dataset, cfg, "segmentation")
