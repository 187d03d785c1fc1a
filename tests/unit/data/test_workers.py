"""Worker processes of the loader: they read what the trainer would read, are named when they fail, and outlive nobody."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from loader_kills import kill_one

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.loader import eval_batches, train_batches
from foveal.data.sampling.sources import TrainingSet, build_training_set
from foveal.data.workers import WorkerPool
from foveal.errors import DataError, StorageUnreachableError, WorkerLostError

Configure = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    """Workers that all tests share, as evaluations and roll-backs of a run do."""
    with closing(WorkerPool(3, 60.0)) as pool:
        yield pool


def training_set(cfg: DataConfig) -> TrainingSet:
    return build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=64)


def train(cfg: DataConfig, workers: WorkerPool | None, steps: range = range(4), size: int = 16) -> list[Batch]:
    with train_batches(
        training_set(cfg),
        cfg,
        rank=1,
        world_size=2,
        microbatch_size=size,
        start_step=steps.start,
        stop_step=steps.stop,
        workers=workers,
    ) as batches:
        return list(batches)


def evaluate(cfg: DataConfig, workers: WorkerPool | None) -> Iterator[Batch]:
    return eval_batches(
        Dataset.open(cfg),
        cfg,
        split="val",
        subset="all",
        training_seed=0,
        rank=1,
        world_size=2,
        microbatch_size=50,
        workers=workers,
    )


def same(batches: list[Batch], others: list[Batch]) -> bool:
    assert len(batches) == len(others)
    return all(
        (one.step, one.epoch, one.microbatch_index) == (other.step, other.epoch, other.microbatch_index)
        and one.bad_samples == other.bad_samples
        and all(torch.equal(value, other.tensors()[name]) for name, value in one.tensors().items())
        for one, other in zip(batches, others, strict=True)
    )


@pytest.mark.parametrize("ahead", [1, 5])
def test_workers_read_what_the_trainer_reads(configure: Configure, workers: WorkerPool, ahead: int) -> None:
    """More batches are held than there are slots. A batch of training waits while an evaluation uses the workers."""
    cfg = configure(prefetch_batches=ahead)
    assert same(train(cfg, workers, range(20, 24)), train(cfg, None, range(20, 24)))
    assert same(train(cfg, workers, size=1), train(cfg, None, size=1))
    with train_batches(
        training_set(cfg),
        cfg,
        rank=1,
        world_size=2,
        microbatch_size=16,
        start_step=0,
        stop_step=4,
        workers=workers,
    ) as batches:
        first = next(batches)
        assert same(list(evaluate(cfg, workers)), list(evaluate(cfg, None)))
        assert same([first, *batches], train(cfg, None))


def test_a_batch_that_is_held_keeps_its_bytes_and_one_that_is_not_gives_its_memory_back(
    configure: Configure, workers: WorkerPool
) -> None:
    cfg = configure(prefetch_batches=1)
    reference, addresses, held = train(cfg, None, range(12)), set(), None
    with train_batches(
        training_set(cfg),
        cfg,
        rank=1,
        world_size=2,
        microbatch_size=16,
        start_step=0,
        stop_step=12,
        workers=workers,
    ) as batches:
        for number, batch in enumerate(batches):
            assert same([batch], [reference[number]])
            if number == 0:
                held = batch.images[3:5]
            addresses.add(batch.images.data_ptr())
    assert held is not None
    assert torch.equal(held, reference[0].images[3:5])
    assert len(addresses) < len(reference) / 2, "most memory was written twice"


def test_what_leaves_early_is_forgotten(configure: Configure, workers: WorkerPool) -> None:
    cfg = configure(prefetch_batches=6)
    for _ in range(3):
        rows = evaluate(cfg, workers)
        next(rows)
        rows.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert same(list(evaluate(cfg, workers)), list(evaluate(cfg, None)))


def test_errors_of_workers_are_those_of_the_reader(
    configure: Configure, digits: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(digits, folder)
    cfg = configure(path=str(folder))
    dataset_rows = evaluate(cfg, workers)
    (folder / "val-000001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"val-000001.tar is cut short: \d+ bytes at \d+ are asked for, 0 left"):
        list(dataset_rows)
    assert same(list(evaluate(configure(), workers)), list(evaluate(configure(), None))), "the workers go on"


def test_the_signals_of_a_scheduler_do_not_end_workers(configure: Configure, workers: WorkerPool) -> None:
    for worker in range(workers.num_workers):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(workers.process_id(worker), number)
    assert same(list(evaluate(configure(), workers)), list(evaluate(configure(), None)))


def test_a_worker_that_hangs_is_named_with_its_sample_and_its_stack(
    configure: Configure, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "hanging"
    shutil.copytree(digits, folder)
    rows = evaluate(configure(path=str(folder), stall_timeout_seconds=1.0), pool := WorkerPool(1, 1.0))
    (folder / "val-000000.tar").unlink()
    os.mkfifo(folder / "val-000000.tar")  # opening it waits for a writer
    with closing(pool):
        with pytest.raises(StorageUnreachableError, match=r"stuck at .*/val-000000.tar: sample 'digit_\d+'"):
            next(rows)
        assert "in read_bytes" in caplog.text, "the stack of the worker"
        start = time.monotonic()
    assert time.monotonic() - start < 5, "closing waits for a worker that hangs"


@pytest.mark.parametrize("kind", ["trainer", "server", "worker"])
def test_whoever_is_killed_is_named_and_nothing_is_left(digits: Path, kind: str) -> None:
    assert WorkerLostError.exit_code == StorageUnreachableError.exit_code == 5
    kill_one(digits, kind, random.Random(2))
