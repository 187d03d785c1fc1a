"""Images of several classes at once: one curve on any ranks, after any stop, and scikit-learn's average precision."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ranks import Ranks, stage_named
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, f1_score

from finetune.config import FinetuneConfig
from finetune.model import classifier_from_plan
from finetune.plan import plan_training
from foveal.data.dataset import Dataset
from foveal.data.image.transforms import normalise
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches
from foveal.errors import DataError
from foveal.forecast.forecast import ClusterSpec, Forecast

STAGE = stage_named("finetune")
NAMES = (*"0123456789", "odd", "prime", "never")


def labels(digit: int) -> list[int]:
    return [digit] + [10] * (digit % 2) + [11] * (digit in (2, 3, 5, 7))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    digits: Any = load_digits()
    for split, rows in (("train", range(160)), ("val", range(160, 219)), ("blank", range(219, 227))):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for row in rows:
                stream = io.BytesIO()
                Image.fromarray((digits.images[row] * 15).astype(np.uint8)).save(stream, "PNG")
                told = json.dumps({"labels": [] if split == "blank" else labels(int(digits.target[row]))}).encode()
                for name, data in (("png", stream.getvalue()), ("json", told)):
                    header = tarfile.TarInfo(f"{row:04d}.{name}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    index_folder(str(folder), classes=NAMES, on_warning=lambda _: None)
    data = {"path": str(folder), "image_size": 8, "channels": 1, "lanes": 8, "eval_crop_ratio": 1.0}
    tree = {
        "seed": 1,
        "epochs": 3,
        "task": "multilabel",
        "data": data | {"augment": {"hflip": 0.0, "scale": [0.8, 1.0]}, "mean": [0.3], "std": [0.37]},
        "batch": {"global_size": 32, "max_micro_size": 16},
        "model": {"name": "vit_tiny_patch16_224", "patch": 2, "width": 32, "depth": 2, "heads": 2},
        "optim": {"lr_per_256": 4.0e-2},
        "mixup": 0.8,
        "label_smoothing": 0.05,
        "evaluate_every": 5,
        "log": {"every": 1},
        "checkpoint": {"every": 0},
    }
    file = folder / "several.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.mark.thorough
def test_ranks_stops_and_measures(config: Path, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    # The tolerance of average precision is for one change of places, and with these positions there is no more.
    settings = ("train_sincos_positions=false", "engine.kind=plain")
    alone = one_rank.train(STAGE, config, tmp_path / "alone", *settings)
    two_settings = ("train_sincos_positions=false", "engine.kind=accelerate", "batch.max_micro_size=8")
    rows = two_ranks.train(STAGE, config, tmp_path / "two", *two_settings)
    one_rank.train(STAGE, config, tmp_path / "parts", *settings, "run.stop_at_step=7")
    parts = one_rank.train(STAGE, config, tmp_path / "parts", *settings)
    for name in ("loss", "val_mAP", "val_f1", "val_loss"):
        found, two, again = ([row[name] for row in each if name in row] for each in (alone, rows, parts))
        assert found
        # Average precision jumps where two scores that differ by rounding change places.
        assert two == pytest.approx(found, rel=1e-3 if name == "val_mAP" else 1e-5), name
        assert again == found, name
    told = json.loads((tmp_path / "alone" / "finished.json").read_text())["summary"]
    scores, truth = _answers(config, tmp_path / "alone" / "export" / "model.safetensors")
    seen = np.asarray(truth.any(axis=0))
    assert not seen[NAMES.index("never")], "a class that no image is of is left out"
    wanted = np.mean([average_precision_score(truth[:, k], scores[:, k]) for k in np.flatnonzero(seen)])
    assert told["val_mAP"] == pytest.approx(wanted, rel=1e-9)
    assert told["val_f1"] == pytest.approx(f1_score(truth, scores > 0, average="micro"), rel=1e-9)
    assert told["val_mAP"] > truth[:, seen].mean() + 0.1, "better than chance"


@pytest.mark.thorough
def test_images_of_no_class_measure_nothing(config: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split 'blank' has no image of any class to measure by: set data.val to"):
        two_ranks.train(STAGE, config, tmp_path, "engine.kind=accelerate", "batch.max_micro_size=8", "data.val=blank")


def test_it_is_planned_without_memory(config: Path) -> None:
    found = plan_training(FinetuneConfig.load(config, ["engine.kind=plain", "run.dir=x"]), 1)
    forecast = Forecast(STAGE, found, ClusterSpec(1, 1, 0.5, 1e9))
    assert forecast.flops_per_sample.forward_backward > 2 * forecast.flops_per_sample.forward
    assert forecast.memory_estimate.peak > 0


def _answers(config: Path, weights: Path) -> tuple[np.ndarray, np.ndarray]:
    """The exported classifier's logits of every image of val, and the truth."""
    found = plan_training(FinetuneConfig.load(config, ["engine.kind=plain", "run.dir=x"]), 1)
    model = classifier_from_plan(found).eval()
    model.encoder.load_state_dict(load_file(weights))
    place = {"split": "val", "subset": "all", "training_seed": 1, "rank": 0, "world_size": 1, "microbatch_size": 16}
    scores, truth = [], []
    for batch in eval_batches(Dataset.open(found.cfg.data), found.cfg.data, label_reader=found.label_reader, **place):  # type: ignore[arg-type]
        with torch.no_grad():
            scores.append(model(normalise(batch.images, found.mean, found.std))[batch.valid].numpy())
        assert batch.targets is not None
        truth.append(batch.targets[batch.valid].numpy())
    return np.concatenate(scores), np.concatenate(truth)
