"""Foreign shards of real images, from `foveal data index` to the first steps of the configs that ship for them.

The shards lie where FOVEAL_TEST_DATA says; nothing is written there.
"""

import gzip
import itertools
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, column
from ranks import Ranks, stage_named

from foveal.cli import app
from foveal.data.format.manifest import read_manifest

_STEPS = 3
# Three steps that a CPU takes in seconds; what the configs say of data, model and recipe stays.
_SMALL = (
    "batch.global_size=16",
    "batch.max_micro_size=8",
    "data.lanes=8",
    f"run.stop_at_step={_STEPS}",
    "engine.kind=plain",
    "log.every=1",
)


@pytest.fixture(scope="module")
def images() -> Path:
    place = os.environ.get("FOVEAL_TEST_DATA")
    if not place:
        pytest.skip("FOVEAL_TEST_DATA is not set: there are no real images here")
    return Path(place)


@pytest.fixture(scope="module")
def cifar10(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10, unpacked and indexed beside its shards."""
    folder = tmp_path_factory.mktemp("cifar10")
    for packed in sorted((images / "cifar10").glob("*.tar.gz")):
        with gzip.open(packed) as source, (folder / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    app(["data", "index", str(folder), "--name", "cifar10"], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def imagenette(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Imagenette's index: its shards may be read-only."""
    index = tmp_path_factory.mktemp("imagenette")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEAL_TEST_DATA", str(images))
        app(["data", "index", "${FOVEAL_TEST_DATA}/imagenette224", "--index", str(index)], standalone_mode=False)
    return index


@pytest.fixture(scope="module")
def camvid(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of frames of CamVid with their masks, indexed."""
    folder = tmp_path_factory.mktemp("camvid")
    for split, frames in (("train", 16), ("val", 3)):
        name = f"{split}-000000.tar"
        with tarfile.open(images / "camvid" / name) as source, tarfile.open(folder / name, "w") as target:
            for member in itertools.islice(source, 2 * frames):  # an image and a mask each
                target.addfile(member, source.extractfile(member))
    classes = "Sky,Building,Pole,Road,Pavement,Tree,SignSymbol,Fence,Car,Pedestrian,Bicyclist"
    app(["data", "index", str(folder), "--classes", classes], standalone_mode=False)
    return folder


def first_steps(stage: str, config: str, run: Path, ranks: Ranks, *overrides: str) -> list[dict[str, float]]:
    rows = ranks.train(stage_named(stage), ROOT / "configs" / stage / f"{config}.yaml", run, *_SMALL, *overrides)
    assert column(rows, "step") == list(range(1, _STEPS + 1))
    assert all(row["applied"] == 1.0 for row in rows)
    return rows


@pytest.mark.thorough
def test_cifar10_is_indexed_whole(cifar10: Path) -> None:
    manifest = read_manifest(cifar10)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 50_000, "val": 10_000}
    assert len(manifest.classes or ()) == 10


def test_imagenette_is_indexed_elsewhere(imagenette: Path, images: Path) -> None:
    manifest = read_manifest(imagenette)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 2_500, "val": 600}
    assert manifest.fields == ("jpg", "cls")
    assert not list((images / "imagenette224").glob("*.index"))


@pytest.mark.thorough
def test_pretraining_on_cifar10(cifar10: Path, one_rank: Ranks, tmp_path) -> None:
    small = (f"data.path={cifar10}", "model.depth=2", "decoder.depth=1")
    rows = first_steps("pretrain", "cifar10", tmp_path / "run", one_rank, *small)
    assert 0.1 < rows[0]["loss"] < 10  # pixels are normalised: an untrained guess is wrong by about their variance
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


def test_pretraining_on_imagenette(imagenette: Path, images: Path, one_rank: Ranks, tmp_path) -> None:
    small = (f"data.path={images}/imagenette224", f"data.index={imagenette}", "model.depth=2", "decoder.depth=1")
    rows = first_steps("pretrain", "imagenette", tmp_path / "run", one_rank, *small)
    assert 0.5 < rows[0]["loss"] < 5  # patches are normalised
    assert list((tmp_path / "run" / "pictures").glob("*.png"))


@pytest.mark.thorough
def test_finetuning_on_cifar10(cifar10: Path, one_rank: Ranks, tmp_path) -> None:
    scratch = ("init=null", "model={name: vit_tiny_patch16_224, patch: 2, depth: 2}", f"data.path={cifar10}")
    rows = first_steps("finetune", "cifar10", tmp_path / "run", one_rank, *scratch, "evaluate_every=0")
    assert rows[0]["loss"] == pytest.approx(2.303, abs=0.05)  # ten classes, and a head that starts indifferent


@pytest.mark.thorough
def test_finetuning_on_imagenette(imagenette: Path, images: Path, one_rank: Ranks, tmp_path) -> None:
    scratch = ("init=null", "model={name: vit_small_patch16_224, depth: 2}")
    place = (f"data.path={images}/imagenette224", f"data.index={imagenette}")
    rows = first_steps("finetune", "imagenette", tmp_path / "run", one_rank, *scratch, *place, "evaluate_every=0")
    assert rows[0]["loss"] == pytest.approx(2.303, abs=0.05)


def test_segmentation_of_camvid(camvid: Path, one_rank: Ranks, tmp_path) -> None:
    """To the end: a measure with a class for every number, a picture of it, and both files of the export."""
    small = (f"data.path={camvid}", "data.index=null", "data.lanes=4", "epochs=1", *_SMALL)
    scratch = (
        "init=null",
        "model={name: vit_tiny_patch16_224, patch: 16, width: 48, depth: 1, heads: 3}",
        "run.stop_at_step=null",
    )
    config = ROOT / "configs" / "finetune" / "camvid.yaml"
    rows = one_rank.train(stage_named("finetune"), config, tmp_path / "run", *small, *scratch)
    assert rows[0]["loss"] == pytest.approx(2.398, abs=0.05)  # eleven classes, and a head that starts indifferent
    assert 0 < rows[-1]["val_miou"] < rows[-1]["val_pixels"] < 1
    assert {"val_iou_Sky", "val_iou_Road"} <= rows[-1].keys()
    (picture,) = (tmp_path / "run" / "pictures").glob("segmentation-*.png")
    with Image.open(picture) as sheet:
        assert sheet.width > 3 * 240
        assert sheet.height > 3 * 180
    assert {file.name for file in (tmp_path / "run" / "export").iterdir()} >= {"model.safetensors", "head.safetensors"}
