"""The evaluation of an encoder: its numbers are those computed by hand, and it leaves nothing behind."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.transforms import normalise
from foveal.data.loader import eval_batches
from foveal.data.sampling import subset as subsets
from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.engines.config import EngineConfig
from foveal.models.config import DecoderConfig, VitConfig
from foveal.models.encode import encode
from foveal.models.mae import MaskedAutoencoder
from foveal.models.vit import build_encoder
from foveal.optim.config import OptimConfig
from foveal.optim.optimizers import parameter_groups
from foveal.seeding import derive_key, draw_uniform
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.progress import ProgressReporter
from foveal.training.validation import evaluate_encoders, evaluate_if_due
from pretrain.objective import MaskedModelingLoss

SEED, PATCH, MEAN, STD = 5, 4, (0.3,), (0.4,)
VIT = VitConfig(name="vit_tiny_patch16_224", patch=PATCH, width=32, depth=2, heads=2, registers=1)


class Rehearsal:
    """A run of one rank on the digits, as far as an evaluation needs one."""

    def __init__(self, digits: Path, **data: Any) -> None:
        tree = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 8, "samples_per_class": 30} | data
        self.world = World(0, 1, 0, "test", torch.device("cpu"))
        cfg = SimpleNamespace(data=DataConfig.from_dict(tree, "here"), seed=SEED, evaluate_every=10)
        dataset = Dataset.open(cfg.data)
        self.plan: Any = SimpleNamespace(cfg=cfg, dataset=dataset, mean=MEAN, std=STD, total_steps=25)
        self.watchdog = SimpleNamespace(heartbeat=lambda *_: None)
        self.throughput_meter = ThroughputMeter()
        self.progress, self.evaluation_seconds = ProgressReporter(), 0.0
        self.recorded: dict[int, dict[str, float]] = {}
        self.is_rollback_due = False

    def read_updates(self) -> bool:
        return not self.is_rollback_due

    def evaluation_batches(
        self, _step: int, *, split: str, subset: Any, size: int = 64, purpose: str = ""
    ) -> Iterator[Batch]:
        plan = self.plan
        parts: dict[str, Any] = {"rank": 0, "world_size": 1, "microbatch_size": size, "training_seed": SEED}
        return eval_batches(plan.dataset, plan.cfg.data, split=split, subset=subset, **parts)

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.recorded[step] = metrics

    def images_of(self, split: str, subset: Any) -> Batch:
        """All images of a subset, in one batch."""
        (batch,) = self.evaluation_batches(0, split=split, subset=subset, size=360)
        return batch.select_rows(batch.valid.nonzero().flatten())


@pytest.fixture(scope="module")
def run(digits: Path) -> Any:
    return Rehearsal(digits)


@pytest.fixture(scope="module")
def setup() -> tuple[MaskedAutoencoder, MaskedModelingLoss, Any]:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        build_encoder(VIT, image_size=16, channels=1), DecoderConfig(width=16, depth=1, heads=2), predict_image=True
    )
    objective = MaskedModelingLoss(SEED, "random", 0.75, 1, True, PATCH, (4, 4), MEAN, STD, image_loss_weight=0.5)
    groups, world = parameter_groups(model, OptimConfig(lr_per_256=1e-3)), World(0, 1, 0, "test", torch.device("cpu"))
    cfg, sizes = EngineConfig(kind="plain"), {"microbatch_size": 64, "accumulation_steps": 1}
    return model, objective, build_engine(model, groups, OptimConfig(lr_per_256=1e-3), cfg, world, **sizes)


@torch.no_grad()
def losses_by_hand(model: MaskedAutoencoder, batch: Batch) -> tuple[float, float]:
    """Mean error of masked patches, normalised per patch, in NumPy; and of the predicted image feature."""
    images = normalise(batch.images, MEAN, STD)
    noise = draw_uniform(derive_key(SEED, "mask"), batch.ids, 18)[:, :16]
    output: Any = model(images, noise, 0.75)
    pixels = images.double().numpy().reshape(-1, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16)
    target = (pixels - pixels.mean(2, keepdims=True)) / np.sqrt(pixels.var(2, ddof=1, keepdims=True) + 1e-6)
    masked = np.argsort(noise.numpy(), axis=1, kind="stable")[:, 4:]
    errors = np.square(output.masked_patch_pred.double().numpy() - np.take_along_axis(target, masked[..., None], 1))
    features = encode(model.encoder, images).double().numpy()[:, 2:].mean(axis=1)
    features = (features - features.mean(1, keepdims=True)) / np.sqrt(features.var(1, keepdims=True) + 1e-5)
    return errors.mean(), np.square(output.image_pred.double().numpy() - features).mean()


@torch.no_grad()
def features_by_hand(model: MaskedAutoencoder, batch: Batch) -> np.ndarray:
    """Mean of the patches: behind the class token and a register."""
    return encode(model.encoder, normalise(batch.images, MEAN, STD)).double().numpy()[:, 2:].mean(axis=1)


def knn_by_hand(queries: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray) -> np.ndarray:
    similarities = 1 - cdist(queries, bank, "cosine")
    predicted = []
    for row in similarities:
        votes = np.zeros(10)
        for nearest in np.argsort(-row)[:20]:
            votes[bank_labels[nearest]] += np.exp(row[nearest] / 0.07)
        predicted.append(votes.argmax())
    return np.array(predicted)


def test_loss_and_accuracy_are_those_by_hand(run: Any, setup: Any) -> None:
    """360 images in batches of 64, of which the last is not full."""
    model, objective, engine = setup
    metrics = evaluate_encoders(engine, run, objective, 7)
    val, train = run.images_of("val", "all"), run.images_of("train", "train")
    assert (len(val.ids), len(train.ids)) == (360, 300)
    patch_loss, image_loss = losses_by_hand(model, val)
    predicted = knn_by_hand(features_by_hand(model, val), features_by_hand(model, train), train.labels.numpy())
    assert metrics == pytest.approx(
        {
            "val_loss": patch_loss + 0.5 * image_loss,
            "val_patch_loss": patch_loss,
            "val_image_loss": image_loss,
            "val_knn_top1": (predicted == val.labels.numpy()).mean(),
        },
        rel=1e-5,
    )
    assert 0.3 < metrics["val_knn_top1"] < 1


def test_it_leaves_the_generator_and_the_mode_as_they_were(run: Any, setup: Any) -> None:
    model, objective, engine = setup
    state = torch.get_rng_state()
    first = evaluate_encoders(engine, run, objective, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate_encoders(engine, run, objective, 8) == first, "the same masks in every evaluation"


def test_a_feature_that_is_no_number_is_near_to_none(run: Any, setup: Any) -> None:
    _, objective, engine = setup

    class Broken(torch.nn.Module):
        def forward(self, images: Tensor, *arguments: Any, features_only: bool = False) -> Any:
            output = setup[0](images, *arguments, features_only=features_only)
            return (output[0] * float("nan"),) if features_only else output

    broken = SimpleNamespace(model=Broken(), device=engine.device, eval_mode=engine.eval_mode)
    assert 0 <= evaluate_encoders(broken, run, objective, 7)["val_knn_top1"] < 0.2  # pyright: ignore[reportArgumentType]


def test_the_bank_is_bounded_and_has_every_sample_once(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that data.balance repeats, and samples without a label."""
    run: Any = Rehearsal(digits, samples_per_class=None, balance=1.0)
    dataset, data = run.plan.dataset, run.plan.cfg.data

    def bank() -> np.ndarray:
        positions = subsets.select_subset(dataset, data, split="train", subset="bank", seed=SEED).split_positions
        assert positions is not None
        return positions

    assert np.array_equal(bank(), np.arange(1437))
    monkeypatch.setattr(subsets, "MAX_BANK_IMAGES", 100)
    few = bank()
    assert len(few) == 100
    assert (np.diff(few) > 0).all()
    assert len(set(dataset.labels("train")[few])) == 10
    data = data.model_copy(update={"balance": 0.0})
    labels = np.where(np.arange(1437) % 3 == 0, dataset.labels("train"), -1)
    monkeypatch.setattr(Dataset, "labels", lambda *_: labels)
    assert (bank() % 3 == 0).all()


@pytest.mark.parametrize("last_step", [None, 24])
def test_when_it_is_due(run: Any, last_step: int | None) -> None:
    due = [step for step in range(26) if evaluate_if_due(run, step, lambda: {"val_loss": 1.0}, last_step=last_step)]
    assert due == ([10, 20, 25] if last_step is None else [10, 20])
    assert set(run.recorded) >= set(due)


def test_a_step_before_a_roll_back_is_not_evaluated(digits: Path) -> None:
    run: Any = Rehearsal(digits)
    run.is_rollback_due = True
    assert not evaluate_if_due(run, 10, lambda: pytest.fail("an evaluation of a void step"))
    assert not run.recorded


def test_its_time_is_not_training(digits: Path) -> None:
    run: Any = Rehearsal(digits)
    now = [0.0]
    run.throughput_meter = ThroughputMeter(clock=lambda: now[0])

    def compute_slowly() -> dict[str, float]:
        now[0] += 100.0
        return {}

    assert evaluate_if_due(run, 10, compute_slowly)
    assert run.throughput_meter.training_seconds == 0
