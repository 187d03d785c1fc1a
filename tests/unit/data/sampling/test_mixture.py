"""Mixtures of data sets: exact shares, the same order on any number of ranks, sources recorded in the ledger."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, stage_named

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import train_batches
from foveal.data.records.audit import audit_epochs, open_ledger
from foveal.data.sampling.sources import build_training_set
from foveal.errors import ConfigError, DataError

BATCH, TRAIN, VAL = 64, 1437, 360
Configure = Callable[..., DataConfig]


@pytest.fixture
def mixed(configure: Configure, digits: Path) -> Configure:
    """The digits' training images mixed with their validation images as a second data set."""

    def make(share: float = 0.25, **settings: object) -> DataConfig:
        return configure(mix=[{"path": str(digits), "split": "val", "fraction": share}], **settings)

    return make


def train(cfg: DataConfig, start: int, stop: int, rank: int = 0, size: int = 1, at_once: int = 16) -> list[Batch]:
    settings: dict[str, Any] = {
        "start_step": start,
        "stop_step": stop,
        "rank": rank,
        "world_size": size,
        "microbatch_size": at_once,
    }
    with train_batches(
        build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH), cfg, **settings
    ) as batches:
        return list(batches)


def test_shares_are_exact_and_every_set_keeps_its_epochs(mixed: Configure) -> None:
    cfg = mixed()
    steps = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH).order.steps_per_epoch
    assert steps == 1437 // 48
    keys = torch.cat([batch.sample_keys for batch in train(cfg, 0, 2 * steps)])
    assert len(keys.unique()) == len(keys), "a sample appears once in an epoch of its data set"
    from_val = (keys % (TRAIN + VAL)) >= TRAIN
    for epoch in range(2):
        part = from_val[epoch * steps * BATCH : (epoch + 1) * steps * BATCH]
        assert int(part.sum()) == steps * BATCH // 4
    epochs = Counter((keys[from_val] // (TRAIN + VAL)).tolist())
    assert epochs == {0: 360, 1: 360, 2: 2 * steps * BATCH // 4 - 720}


def test_what_comes_again_looks_different(mixed: Configure) -> None:
    batches = train(mixed(augment={"scale": (0.2, 0.9)}), 0, 29)
    looks: dict[int, list[bytes]] = {}
    for batch in batches:
        for sample, image in zip(batch.ids.tolist(), batch.images, strict=True):
            looks.setdefault(sample, []).append(image.numpy().tobytes())
    pairs = [views for views in looks.values() if len(views) == 2]
    assert len(pairs) > 50
    assert sum(first == second for first, second in pairs) < 5


@pytest.mark.parametrize(("size", "at_once"), [(2, 8), (4, 16), (8, 1)])
def test_ranks_see_the_same_mixture(mixed: Configure, size: int, at_once: int) -> None:
    reference = train(mixed(0.3), 20, 26)
    ranks = [train(mixed(0.3), 20, 26, rank, size, at_once) for rank in range(size)]
    count = BATCH // size // at_once  # microbatches per rank and step
    dealt = [batch for step in range(6) for batches in ranks for batch in batches[step * count : (step + 1) * count]]
    for name in ("images", "labels", "ids", "sample_keys"):
        assert torch.equal(*(torch.cat([getattr(batch, name) for batch in batches]) for batches in (reference, dealt)))


def test_a_mixed_run_resumes_and_is_audited(
    two_ranks: Ranks, configs: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    mix = f"data.mix=[{{path: {digits}, split: val, share: 0.25}}]"
    stage, overrides = stage_named("pretrain"), (mix, "data.ledger=true", "epochs=2")
    uninterrupted = two_ranks.train(stage, configs["pretrain"], tmp_path / "uninterrupted", *overrides)
    assert len(uninterrupted) == 58
    for stop in (31, 58):
        resumed = two_ranks.train(
            stage, configs["pretrain"], tmp_path / "resumed", *overrides, f"run.stop_at_step={stop}"
        )
    assert [row["loss"] for row in resumed] == [row["loss"] for row in uninterrupted]
    for run in ("uninterrupted", "resumed"):
        audits = audit_epochs(open_ledger(tmp_path / run))
        assert [(audit.source_number, audit.epoch) for audit in audits] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
        assert not [audit for audit in audits if audit.duplicate_split_positions]
        assert sum(audit.samples_by_times_seen[1] for audit in audits if audit.source_number == 1) == 58 * BATCH // 4


def test_mixtures_that_cannot_be_are_sentences(
    mixed: Configure, configure: Configure, digits: Path, configs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"their sum must be below 1"):
        configure(
            mix=[{"path": str(digits), "fraction": share} for share in (0.7, 0.2, 0.1)]
        )  # their float64 sum is below 1
    with pytest.raises(ConfigError, match=r"mix.0.fraction"):
        configure(mix=[{"path": str(digits), "fraction": 0.0}])
    with pytest.raises(DataError, match=r"data.path: no such folder: /nowhere"):
        build_training_set(
            Dataset.open(configure()), mixed().model_copy(update={"mix": _nowhere(mixed())}), seed=0, batch_size=8
        )
    manifest = tmp_path / "index"
    manifest.mkdir()
    text = (digits / "manifest.json").read_text()
    for file in digits.glob("*.index"):
        (manifest / file.name).write_bytes(file.read_bytes())
    (manifest / "manifest.json").write_text(text.replace('"0",', '"zero",', 1))
    mix = f"data.mix=[{{path: {digits}, index: {manifest}, split: val, share: 0.25}}]"
    cfg = FinetuneConfig.load(configs["finetune"], [mix, "run.dir=runs/x"])
    with pytest.raises(DataError, match=r"\(data.mix\) has other classes than"):
        plan_training(cfg, 1)


def _nowhere(cfg: DataConfig) -> tuple[object, ...]:
    return tuple(entry.model_copy(update={"path": "/nowhere"}) for entry in cfg.mix)


def test_a_mixture_does_not_bring_back_what_is_held_out(configure: Configure, digits: Path) -> None:
    cfg = configure(holdout_per_class=5, mix=[{"path": str(digits), "split": "train", "fraction": 0.25}])
    with pytest.raises(ConfigError, match=r"data.mix: .* holds the images that data.holdout_per_class keeps out"):
        build_training_set(Dataset.open(cfg), cfg, seed=0, batch_size=64)
