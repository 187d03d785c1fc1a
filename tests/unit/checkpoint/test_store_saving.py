"""Saving during training: the snapshot's moment, waiting, and the state after a failure."""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from stores import PARTS, SHAPES, Tensors, name, names, saved, state, store

from foveal.checkpoint import saver as module
from foveal.checkpoint.chunks import TensorChunk, count_bytes_to_write
from foveal.checkpoint.host_copy import copy_to_host
from foveal.checkpoint.saver import CheckpointSaver
from foveal.distributed.world import World
from foveal.errors import AttemptSupersededError

WAIT = 60  # seconds that a thread may take on a busy machine
BYTES = 4 * len(PARTS) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


class BlockedDisk:
    """A disk that writes nothing until it is released."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self._write = module.write_and_hash_chunks

    def __call__(self, *arguments: Any) -> str:
        assert self.release.wait(WAIT)
        return self._write(*arguments)


@pytest.fixture
def blocked_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockedDisk]:
    disk = BlockedDisk()
    monkeypatch.setattr(module, "write_and_hash_chunks", disk)
    yield disk
    disk.release.set()


def failing(error: Exception) -> Callable[..., str]:
    def write(*_: object) -> str:
        raise error

    return write


def values_at(root: Path, step: int) -> set[float]:
    engine = Tensors(0)
    checkpoints = store(root)
    checkpoints.load(root / name(step), engine, state(step))
    return engine.values()


def test_what_changes_after_the_save_began_is_not_in_it(blocked_disk: BlockedDisk, tmp_path: Path) -> None:
    checkpoints, engine = store(tmp_path), Tensors(10)
    saver = CheckpointSaver(checkpoints)
    saver.save(engine, state(10))
    assert (saver.is_pending, saver.is_rank_writing) == (True, True)
    assert names(tmp_path) == [f".draft-{name(10)}"]
    engine.fill(11)
    blocked_disk.release.set()
    saved_result = saver.wait_and_commit()
    assert saved_result is not None
    assert (
        saved_result.step,
        saved_result.num_bytes_all_ranks,
        saver.is_pending,
        saver.is_rank_writing,
        checkpoints.latest_step,
    ) == (
        10,
        BYTES,
        False,
        False,
        10,
    )
    assert saved_result.stall_seconds > 0
    assert saved_result.write_seconds <= saved_result.seconds_without_overlap
    assert values_at(tmp_path, 10) == {10.0}


def test_the_updates_come_from_the_engine(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    saver = CheckpointSaver(checkpoints)
    saver.save(Tensors(10, num_updates=7), state(10))
    saver.wait_and_commit()
    latest = checkpoints.find_latest_valid()
    assert latest is not None
    assert latest[1].updates == 7


def test_a_second_save_waits_for_the_first(
    blocked_disk: BlockedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(store(tmp_path))
    saver.save(Tensors(10), state(10))
    pending, buffer = saver._pending, saver._buffer
    assert pending is not None

    def let_go_while_it_waits(seconds: float) -> None:
        threading.Timer(0.05, blocked_disk.release.set).start()
        threading.Thread.join(pending, seconds)

    monkeypatch.setattr(pending, "join", let_go_while_it_waits)
    saved_result = saver.save(Tensors(20), state(20))
    assert saved_result is not None
    assert saved_result.step == 10
    assert saved_result.stall_seconds >= 0.04  # the wait counts as stall
    saver.wait_and_commit()
    assert [values_at(tmp_path, step) for step in (10, 20)] == [{10.0}, {20.0}]
    assert buffer is not None and saver._buffer is buffer, "the copies need no new memory"


def test_without_overlap_a_save_is_done_when_it_returns(tmp_path: Path) -> None:
    saver = CheckpointSaver(store(tmp_path, async_save=False))
    saved_result = saver.save(Tensors(10), state(10))
    assert saved_result is not None
    assert (saved_result.step, saver.is_pending, names(tmp_path)) == (10, False, [name(10)])


def test_a_disk_that_does_not_answer_is_not_waited_for_without_end(
    blocked_disk: BlockedDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = CheckpointSaver(store(tmp_path))
    saver._write_timeout = 0.01
    saver.save(Tensors(10), state(10))
    assert saver.wait_and_commit() is None
    assert saver.save(Tensors(20), state(20)) is None
    assert saver.is_pending
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint of step 10 is still being written after 0 s",
        "the checkpoint of step 10 is still being written after 0 s",
        "NO CHECKPOINT AT STEP 20: the one before is still being written; training goes on, there is none before it",
    ]
    blocked_disk.release.set()
    saver._write_timeout = WAIT
    saved_result = saver.wait_and_commit()
    assert saved_result is not None
    assert names(tmp_path) == [name(10)]


def test_the_copies_need_no_new_memory() -> None:
    """Chunks of any dtype and length, empty ones too, share the first snapshot's buffer and keep their values."""
    chunks = [
        TensorChunk("a", (5,), 2, {"weight": torch.arange(3.0), "exp_avg": torch.arange(3.0) + 7}, (1, 3)),
        TensorChunk("empty", (5,), 5, {"weight": torch.empty(0)}, (0, 0)),
        TensorChunk("flags", (3,), 0, {"weight": torch.tensor([True, False, True])}, (0, 3)),
        TensorChunk("count", (1,), 0, {"weight": torch.tensor([1 << 40])}, (0, 1)),
        TensorChunk("half", (2,), 0, {"weight": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)}, (0, 2)),
    ]
    first, buffer = copy_to_host(chunks)
    assert (first[0].flat_start, first[0].relative_write_range, first[0].shape) == (3, (0, 2), (5,))
    for chunk, copy in zip(chunks, first, strict=True):
        for part, value in chunk.flat_views_by_part.items():
            assert torch.equal(copy.flat_views_by_part[part], value[slice(*chunk.relative_write_range)])
            assert copy.flat_views_by_part[part].dtype == value.dtype
    chunks[0].flat_views_by_part["weight"].fill_(9)
    assert torch.equal(first[0].flat_views_by_part["weight"], torch.tensor([1.0, 2.0]))
    second, again = copy_to_host(chunks, buffer)
    assert again is buffer
    assert torch.equal(second[0].flat_views_by_part["weight"], torch.tensor([9.0, 9.0]))
    assert count_bytes_to_write(chunks) == sum(
        value.nbytes for copy in second for value in copy.flat_views_by_part.values()
    )


# --- failures ---


def test_a_full_disk_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = store(tmp_path)
    saver = CheckpointSaver(checkpoints)
    saved(checkpoints, 10)
    monkeypatch.setattr(module, "write_and_hash_chunks", failing(OSError(28, "No space left on device")))
    saver.save(Tensors(20), state(20))
    assert saver.wait_and_commit() is None
    assert (saver.is_pending, checkpoints.latest_step, names(tmp_path)) == (False, 10, [name(10)])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("NO CHECKPOINT AT STEP 20: rank 0: No space left on device (/")
    assert f"{BYTES / 1e6:.1f} MB were to be written); training goes on, the newest is of step 10" in warning
    monkeypatch.undo()
    saved(checkpoints, 30)
    assert checkpoints.find_latest_valid() == (tmp_path / name(30), state(30))


def test_a_draft_that_cannot_be_begun_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = CheckpointSaver(store(tmp_path / "checkpoints"))
    shutil.rmtree(tmp_path / "checkpoints")
    assert saver.save(Tensors(10), state(10)) is None
    assert not saver.is_pending
    assert "NO CHECKPOINT AT STEP 10: [Errno 2] No such file or directory" in caplog.text


def test_a_mistake_of_the_program_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_and_hash_chunks", failing(ValueError("broken")))
    saver = CheckpointSaver(store(tmp_path))
    saver.save(Tensors(10), state(10))
    with pytest.raises(ValueError, match="broken"):
        saver.wait_and_commit()


def test_too_little_room_is_said_before_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("foveal.atomic.free_bytes_and_mount", lambda _: (100, Path("/disk")))
    saved(store(tmp_path), 10)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        f"{tmp_path} has 0.0 MB left (on /disk) and a checkpoint takes 0.0 MB; make room, or set run.dir to another disk"
    )


def test_who_was_superseded_publishes_nothing(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    saver = CheckpointSaver(checkpoints, is_superseded=lambda: True)
    saved(checkpoints, 10)
    saver.save(Tensors(20), state(20))
    with pytest.raises(AttemptSupersededError, match=f"{name(20)} was not published: another attempt"):
        saver.wait_and_commit()
    assert checkpoints.find_latest_valid() == (tmp_path / name(10), state(10))


def _save_failing(world: World, root: Path, error: Exception, rank: int) -> tuple[str, bool, list[str]]:
    """Save with a failing disk on one rank; return this rank's result, whether a save is pending, and the log."""
    saver, messages = CheckpointSaver(store(root, world=world)), []
    saver.save(Tensors(10, world.rank, world.size), state(10))
    saver.wait_and_commit()
    write = module.write_and_hash_chunks
    if world.rank == rank:
        module.write_and_hash_chunks = failing(error)
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("foveal.checkpoint").addHandler(handler)
    try:
        saver.save(Tensors(20, world.rank, world.size), state(20))
        outcome = str(saver.wait_and_commit())
    except (RuntimeError, ValueError) as caught:
        outcome = repr(caught)
    finally:
        module.write_and_hash_chunks = write
        logging.getLogger("foveal.checkpoint").removeHandler(handler)
    return outcome, saver.is_pending, messages


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_is_known_to_all(two_ranks: Ranks, tmp_path: Path, rank: int) -> None:
    answers = two_ranks.call(_save_failing, tmp_path, OSError(122, "Disk quota exceeded"), rank)
    for outcome, pending, messages in answers:
        assert (outcome, pending) == ("None", False)
        assert len(messages) == 1
        assert messages[0].startswith(f"NO CHECKPOINT AT STEP 20: rank {rank}: Disk quota exceeded (")
    assert names(tmp_path) == [name(10)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_the_program_ends_every_rank(two_ranks: Ranks, tmp_path: Path, rank: int) -> None:
    answers = [outcome for outcome, _, _ in two_ranks.call(_save_failing, tmp_path, ValueError("broken"), rank)]
    assert answers[rank] == "ValueError('broken')"
    assert answers[1 - rank] == f"""RuntimeError("rank {rank}: ValueError('broken')")"""
