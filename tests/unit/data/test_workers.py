"""Worker processes of the loader: they read what the trainer would read, are named when they fail, and outlive nobody."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loader_kills import kill_one
from long_labels import LongLabels

from foveal.data.batch import Batch
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.targets import LabelReader
from foveal.data.loader import eval_batches, train_batches
from foveal.data.row_arrays import RowLayout
from foveal.data.sampling.sources import TrainingSet, build_training_set
from foveal.data.slab import Slab
from foveal.data.workers import WorkerPool
from foveal.errors import ConfigError, DataError, OutOfMemoryError, StorageUnreachableError, WorkerLostError

Configure = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    """Workers that all tests share, as evaluations and roll-backs of a run do."""
    with closing(WorkerPool(3, 60.0)) as pool:
        yield pool


def training_set(cfg: DataConfig) -> TrainingSet:
    return build_training_set(Dataset.open(cfg), cfg, seed=3, batch_size=64)


def train(
    cfg: DataConfig,
    workers: WorkerPool | None,
    steps: range = range(4),
    size: int = 16,
    label_reader: LabelReader | None = None,
) -> Iterator[Batch]:
    with train_batches(
        training_set(cfg),
        cfg,
        rank=1,
        world_size=2,
        microbatch_size=size,
        start_step=steps.start,
        stop_step=steps.stop,
        label_reader=label_reader,
        workers=workers,
    ) as batches:
        yield from batches


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


def same(batches: Iterable[Batch], others: Iterable[Batch]) -> bool:
    batches, others = list(batches), list(others)
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
    batches = train(cfg, workers)
    first = next(batches)
    assert same(evaluate(cfg, workers), evaluate(cfg, None))
    assert same([first, *batches], train(cfg, None))


def test_a_batch_that_is_held_keeps_its_bytes_and_one_that_is_not_gives_its_memory_back(
    configure: Configure, workers: WorkerPool
) -> None:
    cfg = configure(prefetch_batches=1)
    reference, addresses, held = list(train(cfg, None, range(12))), set(), None
    for number, batch in enumerate(train(cfg, workers, range(12))):
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
    assert same(evaluate(cfg, workers), evaluate(cfg, None))


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
    assert same(evaluate(configure(), workers), evaluate(configure(), None)), "the workers go on"


def test_the_signals_of_a_scheduler_do_not_end_workers(configure: Configure, workers: WorkerPool) -> None:
    for worker in range(workers.num_workers):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(workers.process_id(worker), number)
    assert same(evaluate(configure(), workers), evaluate(configure(), None))


def test_a_data_set_that_a_worker_cannot_open_is_the_sentence_of_its_error(
    configure: Configure, digits: Path, tmp_path: Path, workers: WorkerPool
) -> None:
    rows = evaluate(configure(path=f"file://{digits}", cache={"dir": str(tmp_path / "cache")}), workers)
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"data.cache.dir: \S+/cache cannot be made"):
        next(rows)
    assert same(evaluate(configure(), workers), evaluate(configure(), None)), "the workers go on"


@pytest.mark.parametrize(
    ("file", "sample", "stack"),
    [("val-000000.tar", r": sample 'digit_\d+'", "in read_bytes"), ("val-000000.tar.index", "", "in open_index")],
)
def test_a_worker_that_hangs_is_named_with_its_sample_and_its_stack(
    configure: Configure,
    digits: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    sample: str,
    stack: str,
) -> None:
    """An index that hangs has no sample yet: its shard is named."""
    folder = tmp_path / "hanging"
    shutil.copytree(digits, folder)
    rows = evaluate(configure(path=str(folder)), pool := WorkerPool(1, 1.0))
    (folder / file).unlink()
    os.mkfifo(folder / file)  # opening it waits for a writer
    with closing(pool):
        with pytest.raises(StorageUnreachableError, match=rf"stuck at \S+/val-000000.tar{sample};"):
            next(rows)
        assert stack in caplog.text, "the stack of the worker"
        start = time.monotonic()
    assert time.monotonic() - start < 5, "closing waits for a worker that hangs"


def test_a_run_that_was_suspended_does_not_hang(
    configure: Configure, workers: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes stand still for hours. The trainer looks at its clock before the workers have moved."""
    monkeypatch.setattr("foveal.data.workers._POLL_SECONDS", 0.05)
    processes = [workers.process_id(worker) for worker in range(workers.num_workers)]
    hours = iter(range(0, 10**9, 10**4))

    def look() -> float:
        if (now := next(hours)) == 2 * 10**4:
            for process in processes:
                os.kill(process, signal.SIGCONT)
        return now

    monkeypatch.setattr("foveal.data.workers.time", SimpleNamespace(monotonic=look, sleep=time.sleep))
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    assert same(evaluate(configure(), workers), evaluate(configure(), None))


def test_a_full_queue_of_jobs_waits_for_workers_that_wait_for_the_trainer(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More jobs than the pipe and the worker's socket hold."""
    monkeypatch.setattr("foveal.data.workers._PIPE_BYTES", 4096)
    cfg = configure(prefetch_batches=500)
    with closing(WorkerPool(1, 60.0)) as pool:
        assert same(train(cfg, pool, range(16), size=1), train(cfg, None, range(16), size=1))


def test_a_worker_that_is_killed_within_an_answer_is_named(configure: Configure) -> None:
    cfg = configure(prefetch_batches=1)
    with closing(WorkerPool(1, 60.0)) as pool:
        batches = train(cfg, pool, label_reader=LongLabels())
        next(batches)
        wait(pool._connections)  # the worker goes on when its socket is read
        os.kill(pool.process_id(0), signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"\(worker 0, pid \d+\) was killed by SIGKILL while it was"):
            list(batches)


def test_workers_that_do_not_start_are_a_sentence(configure: Configure) -> None:
    """More workers than messages that a socket holds."""
    with (
        closing(WorkerPool(16, 60.0, ["nothing_of_that_name"])) as pool,
        pytest.raises(
            WorkerLostError, match=r"loader did not start \(ModuleNotFoundError: No module named 'nothing_of_"
        ),
    ):
        next(evaluate(configure(), pool))


def test_memory_is_there_before_it_is_written_or_missed_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write to a page that is missing would end the process by SIGBUS."""

    def layout(rows: int) -> RowLayout:
        return RowLayout((("images", (rows, 3, 1000, 1000), "uint8"),))

    slab = Slab(layout(1), 2)
    assert os.fstat(slab.descriptor).st_blocks * 512 >= 2 * 3_000_000
    slab.close()
    with pytest.raises(
        OutOfMemoryError, match=r"^2 microbatches need 6e\+05 GB, and this host has \S+ GB left for them: l"
    ):
        Slab(layout(10**8), 2)
    _, hard = limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        with pytest.raises(
            OutOfMemoryError, match=r"^2 microbatches need 0.00601 GB, which this host refuses \(File too lar"
        ):
            Slab(layout(1), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match=r"files in memory, which this system does not allow .*: set data.workers=0$"):
        Slab(layout(1), 2)


@pytest.mark.parametrize("kind", ["trainer", "server", "worker"])
def test_whoever_is_killed_is_named_and_nothing_is_left(digits: Path, kind: str) -> None:
    assert WorkerLostError.exit_code == StorageUnreachableError.exit_code == 5
    kill_one(digits, kind, random.Random(2))
