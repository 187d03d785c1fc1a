"""Fine-tuning on boxes: one curve on any machine, bit for bit where it stopped, and a measure that knows no ranks."""

import json
from pathlib import Path

import pytest
import yaml
from ranks import Ranks, stage_named
from rectangles import pack_rectangles
from safetensors.torch import load_file

STAGE = stage_named("finetune")
ROWS = ("step", "loss", "class_loss", "box_loss", "centre_loss", "grad_norm")
MEASURED = ("mAP", "mAP_50", "mAP_75", "loss", "ap_light", "ap_dark")
# That the parts of a batch add up: test_splits.py.
FSDP2 = ("engine.kind=accelerate", "engine.sharding=fsdp2", "batch.max_micro_size=4")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rectangles")
    pack_rectangles(folder / "data")
    data = {"path": str(folder / "data"), "image_size": 32, "channels": 1, "lanes": 4}
    tree = {
        "seed": 3,
        "epochs": 8,
        "task": "detection",
        "data": data | {"eval_crop_ratio": 1.0, "augment": {"scale": [0.8, 1.0]}, "mean": [0.5], "std": [0.25]},
        "batch": {"global_size": 16, "max_micro_size": 16},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2},
        "detect": {"width": 32, "layers": 1, "strides": [4, 8, 16], "each_class": True},
        "drop_path": 0.1,
        "optim": {"lr_per_256": 1.5e-2, "warmup_epochs": 1, "max_grad_norm": 1.0, "layer_decay": 0.9},
        "log": {"every": 5, "images_every": 8},
    }
    (folder / "boxes.yaml").write_text(yaml.safe_dump(tree))
    return folder / "boxes.yaml"


@pytest.fixture(scope="module")
def whole(config: Path, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank, evaluated in the middle."""
    run = tmp_path_factory.mktemp("detection") / "whole"
    one_rank.train(STAGE, config, run, "engine.kind=plain", "evaluate_every=8")
    return run


def rows_of(run: Path, *names: str) -> list[list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in names] for row in rows if all(name in row for name in names)]


def test_one_curve(config: Path, whole: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    """A quarter of the images have no box: a rank or a micro may hold only such."""
    two_ranks.train(STAGE, config, tmp_path / "run", *FSDP2, "run.stop_at_step=8")
    ours, theirs = rows_of(tmp_path / "run", *ROWS), rows_of(whole, *ROWS)[:8]
    assert len(ours) == 8
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)


@pytest.mark.thorough
def test_it_goes_on_where_it_stopped_and_on_other_ranks(
    config: Path, whole: Path, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    words = ("engine.kind=plain", "evaluate_every=8")
    one_rank.train(STAGE, config, tmp_path / "parts", *words, "run.stop_at_step=5")
    one_rank.train(STAGE, config, tmp_path / "parts", *words)
    assert rows_of(tmp_path / "parts", *ROWS) == rows_of(whole, *ROWS)
    measured = [f"val_{name}" for name in MEASURED]
    assert rows_of(tmp_path / "parts", *measured) == rows_of(whole, *measured)
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (tmp_path / "parts", whole))
    assert all(ours[each].equal(theirs[each]) for each in theirs)

    one_rank.train(STAGE, config, tmp_path / "moved", *words, "run.stop_at_step=14")
    two_ranks.train(STAGE, config, tmp_path / "moved", "engine.kind=accelerate", "evaluate_every=8")
    for mine, reference in zip(rows_of(tmp_path / "moved", *ROWS), rows_of(whole, *ROWS), strict=True):
        assert mine == pytest.approx(reference, rel=1e-5)
    # Every image once, whoever looked at it: 10 images on two ranks leave rows that only fill up.
    (ours,), (theirs,) = (rows_of(run, *measured)[-1:] for run in (tmp_path / "moved", whole))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert theirs[1] > 0.5
    assert theirs[0] == pytest.approx((theirs[4] + theirs[5]) / 2)


def test_pictures_are_drawn_when_they_are_due(whole: Path) -> None:
    names = {file.name for file in (whole / "pictures").iterdir()}
    assert names >= {"boxes-00000008.png", "boxes-00000016.png"}
    assert {name.partition("-000")[2] for name in names} == {"00008.png", "00016.png"}, "of no other step"
