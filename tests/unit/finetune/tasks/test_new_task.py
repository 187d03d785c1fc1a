"""A task without classes in one file: the mean brightness of an image, read from a .txt member.

Its class and one line of the registry are all that planning, training, evaluation, export, predictions and the data
tools need.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from finetune.config import FinetuneConfig
from finetune.model import encoder_from_plan, model_from_export, param_groups_from_plan
from finetune.plan import plan_training
from finetune.run import STAGE
from finetune.task import FinetunePlan, Task
from finetune.tasks.registry import TASKS
from finetune.train import train
from foveal.cli import app
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import AppliedCrop, LabelReader, resolve_label_field
from foveal.data.image.transforms import normalise
from foveal.data.indexing.index import index_folder
from foveal.data.sampling.subset import SubsetName
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import ConfigError, DataError
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.inference.exported_model import ExportedModel
from foveal.inference.image_transform import ImageFrame
from foveal.inference.predictions import Columns, Prediction
from foveal.models.encoder_with_head import EncoderWithHead, set_noise_cast_images
from foveal.training.evaluations import Metric
from foveal.training.loop import TrainingSetup
from foveal.training.run import Run
from foveal.training.run_directory import open_run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
SIDE, TRAIN = 16, 32
GREYS = torch.randint(0, 256, (48,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# --- the task ---


@dataclass(frozen=True)
class BrightnessReader(LabelReader):
    """Reader of a number in [0, 1]: float32 []."""

    field: str

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        try:
            return np.array(float(data), np.float32)
        except ValueError:
            raise DataError(f"{location}: its .{self.field} is no number") from None

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.array(np.nan, np.float32)

    def describe_label(self, label: np.ndarray) -> str:
        return f"{label:.2f}"


class BrightnessModel(EncoderWithHead):
    """An encoder's pooled feature and a linear head."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self.head = nn.Linear(encoder.num_features, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(set_noise_cast_images(self.encoder, images, None)))[:, 0]


@dataclass(frozen=True)
class BrightnessLoss:
    """Squared error."""

    plan: FinetunePlan

    def batch_weight(self, batch: Batch) -> Tensor:
        return (batch.ids >= 0).sum()

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.targets is not None
        return (model(normalise(batch.images, self.plan.mean, self.plan.std)) - batch.targets).square().sum(), {}


class Brightness(Task):
    """The mean brightness of an image."""

    name = "brightness"
    prediction_columns: ClassVar[Columns] = {"brightness": float}
    supported_settings = frozenset({"pooling", "data.label_field"})

    def make_label_reader(self, cfg: DataConfig, dataset: Dataset) -> LabelReader:
        return BrightnessReader(resolve_label_field(cfg, dataset, "txt", self.name))

    def build(self, plan: FinetunePlan, device: torch.device) -> TrainingSetup[Any]:
        model = BrightnessModel(encoder_from_plan(plan))
        return TrainingSetup(model, param_groups_from_plan(plan, model), BrightnessLoss(plan))

    def head_card(self, plan: FinetunePlan) -> dict[str, Any]:
        return {"kind": self.name}

    def metrics(self, cfg: FinetuneConfig) -> tuple[Metric, ...]:
        return (Metric("error", higher_is_better=False),)

    def compute_metrics(
        self, engine: Engine, run: Run, step: int, *, split: str, subset: SubsetName
    ) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        with engine.eval_mode():
            for batch in run.evaluation_batches(step, split=split, subset=subset):
                assert batch.targets is not None
                errors = (engine.model(normalise(batch.images, run.plan.mean, run.plan.std)) - batch.targets).abs()
                sums += torch.stack([errors[batch.valid].sum(), batch.valid.sum()]).double()
        error, images = run.world.all_reduce_sum(sums).tolist()
        return {"error": error / images}

    def model_from_export(self, export_dir: Path) -> nn.Module:
        return model_from_export(export_dir, self.name, lambda encoder, *_: BrightnessModel(encoder))

    def predict(
        self, model: ExportedModel, images: Tensor, frames: Sequence[ImageFrame], top: int | None
    ) -> list[Prediction]:
        return [Prediction(({"brightness": value},)) for value in model.module(images).tolist()]


# --- the proof ---


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of the task on 48 images of one grey each; the registry has the task."""
    monkeypatch.setitem(TASKS, "brightness", Brightness())
    folder = tmp_path / "data"
    folder.mkdir()
    greys = GREYS.tolist()
    for split, numbers in (("train", range(TRAIN)), ("val", range(TRAIN, len(greys)))):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number in numbers:
                stream = io.BytesIO()
                Image.new("L", (SIDE, SIDE), greys[number]).save(stream, "PNG")
                for name, data in (("png", stream.getvalue()), ("txt", f"{greys[number] / 255:.4f}\n".encode())):
                    header = tarfile.TarInfo(f"{number:03d}.{name}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
    index_folder(str(folder), on_warning=lambda _: None)
    return {
        "task": "brightness",
        "epochs": 10,
        "data": {"path": str(folder), "image_size": SIDE, "channels": 1, "lanes": 4, "mean": [0.5], "std": [0.25]},
        "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 16},
        "optim": {"lr_per_256": 0.1, "warmup_epochs": 0},
        "engine": {"kind": "plain"},
        "run": {"dir": str(tmp_path / "run")},
        "tracking": {"uri": None},
        "evaluate_every": 2,
        "early_stopping": {"metric": "val_error", "patience": None},
    }


def test_it_trains_and_the_lowest_error_is_exported(settings: dict[str, Any], tmp_path: Path) -> None:
    plan = plan_training(FinetuneConfig.from_dict(settings, "here"), 1)
    assert plan.classes == ()
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        train(plan, run)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    errors = {row["step"]: row["val_error"] for row in rows if "val_error" in row}
    assert list(errors) == list(range(2, 21, 2))
    assert errors[20] < errors[2] / 2, "nothing was learned"
    best = min(errors, key=errors.__getitem__)
    summary = json.loads((tmp_path / "run/finished.json").read_text())["summary"]
    assert (summary["best_step"], summary["val_error"]) == (best, errors[best])

    model = TASKS["brightness"].model_from_export(tmp_path / "run/export")
    card = json.loads((tmp_path / "run/export/card.json").read_text())
    assert (card["step"], card["classes"], card["head"]) == (best, [], {"kind": "brightness"})
    images = GREYS[TRAIN:, None, None, None].expand(-1, 1, SIDE, SIDE)
    error = (model(normalise(images, plan.mean, plan.std)) - GREYS[TRAIN:] / 255).abs().mean().item()
    assert error == pytest.approx(errors[best], abs=1e-4), "these are the weights of the best evaluation"

    val, out = f"{settings['data']['path']}/val-000000.tar", tmp_path / "greys.jsonl"
    predict = ["predict", str(tmp_path / "run"), val, "--out", str(out), "--overlays", str(tmp_path / "drawn")]
    assert CliRunner().invoke(app, predict).exit_code == 0
    predicted = torch.tensor([json.loads(line)["brightness"] for line in out.read_text().splitlines()])
    assert (predicted - GREYS[TRAIN:] / 255).abs().mean().item() == pytest.approx(errors[best], abs=1e-4)
    assert len(list((tmp_path / "drawn").iterdir())) == len(GREYS) - TRAIN


def test_the_commands_know_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """``foveal plan`` traces a sample with its label; ``data verify`` reads every label, ``data show`` writes them."""
    plan = plan_training(FinetuneConfig.from_dict(settings, "here"), 1)
    forecast = Forecast(STAGE, plan, ClusterSpec(1, 1, 0.5, 1e9))
    assert forecast.flops_per_sample.forward_backward > forecast.flops_per_sample.forward > 0
    assert forecast.memory_estimate.peak > 0

    data, sheet = settings["data"]["path"], tmp_path / "sheet.png"
    shown = CliRunner().invoke(app, ["data", "show", data, "--task", "brightness", "--sheet", str(sheet)])
    assert shown.exit_code == 0, shown.output
    plain = CliRunner().invoke(app, ["data", "show", data, "--sheet", str(tmp_path / "plain.png")])
    assert plain.exit_code == 0, plain.output
    assert sheet.read_bytes() != (tmp_path / "plain.png").read_bytes(), "captions are the labels"

    verify = ["data", "verify", data, "--full", "--task", "brightness"]
    assert CliRunner().invoke(app, verify).exit_code == 0
    shard = Path(data) / "val-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"0.", b"x.", 1))
    faulty = CliRunner().invoke(app, verify)
    assert faulty.exit_code == 1
    assert "its .txt is no number" in faulty.output


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mixup": 0.5}, "mixup is for images with classes, and task=brightness does not support it"),
        ({"label_smoothing": 0.1}, "label_smoothing is for classes of images or pixels, and task=brightness"),
        ({"early_stopping": {"metric": "val_top1", "patience": 1}}, "every evaluation logs: val_error"),
        (
            {"trials": {"arms": {"a": None}, "lr_per_256": [0.1]}, "early_stopping": None},
            "which task=brightness has not",
        ),
    ],
)
def test_it_refuses_what_it_does_not_support(settings: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan_training(FinetuneConfig.from_dict(settings | changes, "here"), 1)
