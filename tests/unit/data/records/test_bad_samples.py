"""Samples that do not decode: the replacement does not depend on ranks or resumes; transient faults replace nothing."""

import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, stage_named

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.indexing.index import index_folder
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import build_training_set
from foveal.distributed.world import World
from foveal.errors import DataError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage

BATCH = 64
Configure = Callable[..., DataConfig]
Spoil = Callable[..., Path]


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> Spoil:
    """Return a factory of copies of the digits with damaged images in one shard; reindexed, so without sha256."""

    def make(shard: str, rows: slice, *, reindex: bool = True) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(digits, folder, dirs_exist_ok=True)
        with tarfile.open(folder / shard) as tar:
            images = [member for member in tar if member.name.endswith(".png")][rows]
        data = bytearray((folder / shard).read_bytes())
        for member in images:
            data[member.offset_data + 40 : member.offset_data + member.size] = bytes(member.size - 40)
        (folder / shard).write_bytes(data)
        if reindex:
            (folder / "manifest.json").unlink()
            index_folder(str(folder), classes=[str(digit) for digit in range(10)])
        return folder

    return make


def train(
    cfg: DataConfig, start_step: int, stop_step: int, rank: int = 0, world_size: int = 1, microbatch_size: int = 16
) -> list[Batch]:
    training_set = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH)
    with train_batches(
        training_set,
        cfg,
        rank=rank,
        world_size=world_size,
        microbatch_size=microbatch_size,
        start_step=start_step,
        stop_step=stop_step,
    ) as batches:
        return list(batches)


def rows(batches: list[Batch]) -> list[tuple[int, int, int, bytes]]:
    """Return (step, id, label, pixels) of every row, in order."""
    values = []
    for batch in batches:
        columns = zip(batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True)
        values += [(batch.step, sample, label, image.numpy().tobytes()) for sample, label, image in columns]
    return values


STATISTICS = {"mean": (0.3,), "std": (0.4,)}


def test_a_bad_sample_is_replaced_and_nothing_else_changes(configure: Configure, spoilt: Spoil) -> None:
    clean = rows(train(configure(**STATISTICS), 0, 22))
    batches = train(configure(path=str(spoilt("train-000002.tar", slice(7, 8))), **STATISTICS), 0, 22)
    (bad,) = [bad for batch in batches for bad in batch.bad_samples]
    assert bad.sample_key == int(Dataset.open(configure()).samples_per_shard("train")[:2].sum()) + 7
    assert (bad.split, bad.shard.rpartition("/")[2]) == ("train", "train-000002.tar")
    assert bad.webdataset_key.startswith("digit_")
    assert bad.reason
    changed = [pair for pair in zip(clean, rows(batches), strict=True) if pair[0] != pair[1]]
    assert len(changed) == 1
    ((original, replacement),) = changed
    assert original[1] == bad.sample_key
    assert replacement[1] == bad.replacement_key
    own_row = next(row for row in clean if row[1] == bad.replacement_key)
    assert replacement[2:] == own_row[2:], "a replacement has the pixels of its own slot in the same epoch"


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(2, 16), (4, 8), (8, 8)])
def test_ranks_and_resumes_choose_the_same_stand_in(
    configure: Configure, spoilt: Spoil, world_size: int, microbatch_size: int
) -> None:
    path = str(spoilt("train-000001.tar", slice(0, 12)))
    reference = train(configure(path=path, **STATISTICS), 0, 30)
    assert sum(len(batch.bad_samples) for batch in reference) >= 12
    cfg = configure(path=path, **STATISTICS)
    ranks = [
        train(cfg, 0, 11, rank, world_size, microbatch_size) + train(cfg, 11, 30, rank, world_size, microbatch_size)
        for rank in range(world_size)
    ]
    count = BATCH // world_size // microbatch_size
    in_slot_order = [
        batch for step in range(30) for batches in ranks for batch in batches[step * count : (step + 1) * count]
    ]
    assert rows(in_slot_order) == rows(reference)


def test_a_shard_that_is_not_what_the_manifest_says_stops_the_run(configure: Configure, spoilt: Spoil) -> None:
    folder = spoilt("train-000002.tar", slice(7, 8), reindex=False)
    with pytest.raises(DataError, match=r"train-000002.tar .*sha256"):
        train(configure(path=str(folder)), 0, 22)


def test_a_read_that_changes_stops_the_run(
    configure: Configure, spoilt: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(path=str(spoilt("train-000002.tar", slice(7, 8))), **STATISTICS)
    dataset = Dataset.open(cfg)
    read_bytes, calls = dataset.read_bytes, iter(range(10**6))

    def flickering(shard: str, offset: int, size: int) -> bytes:
        return read_bytes(shard, offset, size)[:-1] + bytes([next(calls) % 256])

    object.__setattr__(dataset, "read_bytes", flickering)
    training = build_training_set(dataset, cfg, seed=3, batch_size=BATCH)
    with (
        train_batches(training, cfg, rank=0, world_size=1, microbatch_size=16, start_step=0, stop_step=22) as batches,
        pytest.raises(DataError, match=r"reads differently each time"),
    ):
        list(batches)


def test_a_window_without_one_good_sample_is_a_sentence(configure: Configure, spoilt: Spoil) -> None:
    folder = spoilt("val-000000.tar", slice(None))
    spoilt("val-000001.tar", slice(None))
    cfg = configure(path=str(folder), train="val", **STATISTICS)
    with pytest.raises(DataError, match=r"does not decode, nor does any of the \d+ samples that could replace it"):
        train(cfg, 0, 1)


def test_training_never_leaves_a_row_empty(
    configure: Configure, spoilt: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last window of a lane may have a single sample, and so no replacement."""
    cfg = configure(path=str(spoilt("train-000002.tar", slice(7, 8))), **STATISTICS)
    training = build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=BATCH)
    monkeypatch.setattr(training.order, "replacement_subset_positions", lambda _source, _position: iter(()))
    with (
        train_batches(training, cfg, rank=0, world_size=1, microbatch_size=16, start_step=0, stop_step=22) as batches,
        pytest.raises(DataError, match=r"does not decode, nor does any of the 0 samples"),
    ):
        list(batches)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_leaves_its_row_empty(configure: Configure, spoilt: Spoil, world_size: int) -> None:
    cfg = configure(path=str(spoilt("val-000000.tar", slice(5, 7))), **STATISTICS)
    batches = [
        batch
        for rank in range(world_size)
        for batch in eval_batches(
            Dataset.open(cfg),
            cfg,
            split="val",
            subset="all",
            training_seed=0,
            rank=rank,
            world_size=world_size,
            microbatch_size=50,
        )
    ]
    assert sorted(bad.sample_key for batch in batches for bad in batch.bad_samples) == [5, 6]
    assert all(bad.replacement_key == -1 for batch in batches for bad in batch.bad_samples)
    ids = torch.cat([batch.ids[batch.valid] for batch in batches])
    assert sorted(ids.tolist()) == [sample for sample in range(360) if sample not in {5, 6}]
    assert all((batch.labels[~batch.valid] == -1).all() for batch in batches)


# Full runs


def quarantined(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def settings(folder: Path, *overrides: str) -> list[str]:
    return [f"data.path={folder}", "data.mean=[0.3]", "data.std=[0.4]", *overrides]


def test_a_run_goes_on_and_says_what_was_bad(
    two_ranks: Ranks, configs: dict[str, Path], spoilt: Spoil, tmp_path: Path
) -> None:
    folder, stage = spoilt("train-000003.tar", slice(9, 10)), stage_named("pretrain")
    overrides = settings(folder, "epochs=2", "checkpoint.every=5", "batch.max_micro_size=16")
    reference = two_ranks.train(stage, configs["pretrain"], tmp_path / "reference", *overrides)
    assert reference[-1]["bad_samples"] == 1.0
    (entry,) = quarantined(tmp_path / "reference")
    assert entry["shard"].endswith("train-000003.tar")
    for stop, workers in ((25, 2), (44, 0)):  # resumed in the second epoch, which meets the sample again
        more = (f"run.stop_at_step={stop}", f"data.workers={workers}")
        resumed = two_ranks.train(stage, configs["pretrain"], tmp_path / "resumed", *overrides, *more)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in reference]
    assert quarantined(tmp_path / "resumed") == [entry]


def test_too_many_stop_every_rank(two_ranks: Ranks, configs: dict[str, Path], spoilt: Spoil, tmp_path: Path) -> None:
    folder = spoilt("train-000003.tar", slice(9, 12))
    with pytest.raises(
        DataError, match=r"\d samples of split 'train' do not decode, and data.max_bad_fraction allows 1.437"
    ):
        two_ranks.train(stage_named("pretrain"), configs["pretrain"], tmp_path / "run", *settings(folder))
    assert len(quarantined(tmp_path / "run")) >= 2
    rows = read_rows_without_time(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["bad_samples"] >= 2, "the metrics of the last step are written before the run stops"
    assert two_ranks.call(_rank) == [0, 1], "both ranks are free for the next run"


def test_accuracy_leaves_out_what_does_not_decode(
    two_ranks: Ranks, configs: dict[str, Path], spoilt: Spoil, tmp_path: Path
) -> None:
    overrides = [f"data.path={spoilt('val-000001.tar', slice(3, 4))}", "data.max_bad_fraction=0.01", "data.workers=2"]
    two_ranks.train(stage_named("finetune"), configs["finetune"], tmp_path / "run", *overrides)
    results = json.loads((tmp_path / "run" / "finished.json").read_text())["summary"]
    assert round(results["val_top1"] * 359, 6).is_integer()
    assert [entry["split"] for entry in quarantined(tmp_path / "run")] == ["val"]


def _rank(world: World) -> int:
    return world.rank


def _one_hangs(world: World, config: str, overrides: list[str], hanging: str) -> tuple[str, float]:
    """Have rank 1 read a data set that hangs; return this rank's error message and the seconds until it."""
    stage = stage_named("pretrain")
    open_dataset = Dataset.open

    def open_other(cfg: DataConfig) -> Dataset:
        return open_dataset(cfg.model_copy(update={"path": hanging}))

    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(Dataset, "open", open_other)
        try:
            run_stage(stage, load_config(stage.config_class, "pretrain", config, overrides), world)
        except DataError as error:
            return str(error), time.monotonic() - start
    raise AssertionError


def test_a_rank_whose_loader_hangs_fails_all_together(
    two_ranks: Ranks, configs: dict[str, Path], digits: Path, tmp_path: Path
) -> None:
    run, hanging = tmp_path / "run", tmp_path / "hanging"
    shutil.copytree(digits, hanging)
    shard = hanging / "train-000003.tar"
    shard.unlink()
    os.mkfifo(shard)  # opening it waits for a writer; rank 0 alone looks at the files of its own set before
    overrides = [f"data.path={digits}", f"run.dir={run}", "tracking.uri=null", "data.stall_timeout_seconds=4"]
    overrides.append("data.workers=1")
    arguments = (str(configs["pretrain"]), overrides, str(hanging))
    (message_0, seconds_0), (message_1, seconds_1) = two_ranks.call(_one_hangs, *arguments)
    assert message_0 == message_1
    assert re.search(r"the loader is stuck at .*train-0000\d\d.tar: sample 'digit_\d{4}'", message_0)
    assert max(seconds_0, seconds_1) < 120
    assert "in read_bytes" in (run / "logs" / "rank-001.log").read_text(), "the stack of the worker that hangs"
    assert read_rows_without_time(run / "metrics.jsonl") is not None
    assert "Unreachable" in (run / "logs" / "rank-000.log").read_text()
