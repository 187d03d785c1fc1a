"""Saving while training goes on: what is copied when, what is kept, and what a failure leaves behind."""

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

from foveal.checkpoint import store as module
from foveal.checkpoint.chunks import TensorChunk
from foveal.checkpoint.writer import BackgroundWriter, count_bytes
from foveal.distributed.world import World
from foveal.errors import AttemptSupersededError

WAIT = 60  # seconds that a thread may take on a busy machine
BYTES = 4 * len(PARTS) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


class Held:
    """A disk that takes nothing until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self._write = module.write_chunks

    def __call__(self, *arguments: Any) -> str:
        assert self.go.wait(WAIT)
        return self._write(*arguments)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held()
    monkeypatch.setattr(module, "write_chunks", made)
    yield made
    made.go.set()


def failing(error: Exception) -> Callable[..., str]:
    def write(*_: object) -> str:
        raise error

    return write


def values_at(root: Path, step: int) -> set[float]:
    engine = Tensors(0)
    made = store(root)
    made.load(root / name(step), engine, state(step))
    return engine.values()


def test_what_changes_after_the_save_began_is_not_in_it(held: Held, tmp_path: Path) -> None:
    made, engine = store(tmp_path), Tensors(10)
    made.save(engine, state(10))
    assert (made.is_save_pending, made.is_writing) == (True, True)
    assert names(tmp_path) == [f".draft-{name(10)}"]
    engine.fill(11)
    held.go.set()
    got = made.wait_and_commit()
    assert got is not None
    assert (got.step, got.num_bytes, made.is_save_pending, made.is_writing, made.latest_step) == (
        10,
        BYTES,
        False,
        False,
        10,
    )
    assert got.stall_seconds > 0
    assert got.write_seconds <= got.sync_seconds
    assert values_at(tmp_path, 10) == {10.0}


def test_the_updates_come_from_the_engine(tmp_path: Path) -> None:
    made = store(tmp_path)
    made.save(Tensors(10, num_updates=7), state(10))
    made.wait_and_commit()
    found = made.find_latest()
    assert found is not None
    assert found[1].updates == 7


def test_a_second_save_waits_for_the_first(held: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path)
    made.save(Tensors(10), state(10))
    wait = made._writer.wait

    def let_go_while_it_waits(seconds: float) -> None:
        threading.Timer(0.05, held.go.set).start()
        wait(seconds)

    monkeypatch.setattr(made._writer, "wait", let_go_while_it_waits)
    settled = made.save(Tensors(20), state(20))
    assert settled is not None
    assert settled.step == 10
    assert settled.stall_seconds >= 0.04  # the wait is part of what it cost
    made.wait_and_commit()
    assert [values_at(tmp_path, step) for step in (10, 20)] == [{10.0}, {20.0}]


def test_without_overlap_a_save_is_done_when_it_returns(tmp_path: Path) -> None:
    made = store(tmp_path, overlap=False)
    got = made.save(Tensors(10), state(10))
    assert got is not None
    assert (got.step, made.is_save_pending, names(tmp_path)) == (10, False, [name(10)])


def test_a_disk_that_does_not_answer_is_not_waited_for_without_end(
    held: Held, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path)
    made._patience = 0.01
    made.save(Tensors(10), state(10))
    assert made.wait_and_commit() is None
    assert made.save(Tensors(20), state(20)) is None
    assert made.is_save_pending
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint of step 10 is still being written after 0 s",
        "the checkpoint of step 10 is still being written after 0 s",
        "NO CHECKPOINT AT STEP 20: the one before is still being written; training goes on, there is none before it",
    ]
    held.go.set()
    made._patience = WAIT
    got = made.wait_and_commit()
    assert got is not None
    assert names(tmp_path) == [name(10)]


def test_the_copies_need_no_new_memory() -> None:
    """Runs of any type and length, empty ones too, share the buffer of the first snapshot; each is what it was."""
    pieces = [
        TensorChunk("a", (5,), 2, {"weight": torch.arange(3.0), "exp_avg": torch.arange(3.0) + 7}, (1, 3)),
        TensorChunk("empty", (5,), 5, {"weight": torch.empty(0)}, (0, 0)),
        TensorChunk("flags", (3,), 0, {"weight": torch.tensor([True, False, True])}, (0, 3)),
        TensorChunk("count", (1,), 0, {"weight": torch.tensor([1 << 40])}, (0, 1)),
        TensorChunk("half", (2,), 0, {"weight": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)}, (0, 2)),
    ]
    writer = BackgroundWriter()
    first = writer.snapshot(pieces)
    place = writer._host.data_ptr()
    assert (first[0].start, first[0].write_range, first[0].shape) == (3, (0, 2), (5,))
    for piece, copy in zip(pieces, first, strict=True):
        for part, value in piece.tensors.items():
            assert torch.equal(copy.tensors[part], value[slice(*piece.write_range)])
            assert copy.tensors[part].dtype == value.dtype
    pieces[0].tensors["weight"].fill_(9)
    assert torch.equal(first[0].tensors["weight"], torch.tensor([1.0, 2.0]))
    second = writer.snapshot(pieces)
    assert writer._host.data_ptr() == place
    assert torch.equal(second[0].tensors["weight"], torch.tensor([9.0, 9.0]))
    assert count_bytes(pieces) == sum(each.nbytes for copy in second for each in copy.tensors.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_copied_to_pinned_memory_in_order() -> None:
    """What is queued before the snapshot is in it, what is queued after it is not."""
    values = torch.zeros(1 << 22, device="cuda")
    pieces = [TensorChunk("a", (len(values),), 0, {"weight": values}, (0, len(values)))]
    writer = BackgroundWriter()
    for number in range(1, 4):
        for _ in range(100):
            values += 0.01
        (copy,) = writer.snapshot(pieces)
        values += 7
        values -= 7
        assert copy.tensors["weight"].is_pinned()
        torch.testing.assert_close(copy.tensors["weight"], torch.full((len(values),), float(number)), rtol=1e-4, atol=0)


# --- failures ---


def test_a_full_disk_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path)
    saved(made, 10)
    monkeypatch.setattr(module, "write_chunks", failing(OSError(28, "No space left on device")))
    made.save(Tensors(20), state(20))
    assert made.wait_and_commit() is None
    assert (made.is_save_pending, made.latest_step, names(tmp_path)) == (False, 10, [name(10)])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("NO CHECKPOINT AT STEP 20: rank 0: No space left on device (/")
    assert f"{BYTES / 1e6:.1f} MB were to be written); training goes on, the newest is of step 10" in said
    monkeypatch.undo()
    saved(made, 30)
    assert made.find_latest() == (tmp_path / name(30), state(30))


def test_a_draft_that_cannot_be_begun_stops_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = store(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints")
    assert made.save(Tensors(10), state(10)) is None
    assert not made.is_save_pending
    assert "NO CHECKPOINT AT STEP 10: [Errno 2] No such file or directory" in caplog.text


def test_a_mistake_of_the_program_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_chunks", failing(ValueError("broken")))
    made = store(tmp_path)
    made.save(Tensors(10), state(10))
    with pytest.raises(ValueError, match="broken"):
        made.wait_and_commit()


def test_too_little_room_is_said_before_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("foveal.atomic.get_free_space", lambda _: (100, Path("/disk")))
    saved(store(tmp_path), 10)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"{tmp_path} has 0.0 MB left (on /disk) and a checkpoint takes 0.0 MB; make room, or set run.dir to another disk"
    )


def test_who_was_superseded_publishes_nothing(tmp_path: Path) -> None:
    made = store(tmp_path)
    saved(made, 10)
    made._superseded = lambda: True
    made.save(Tensors(20), state(20))
    with pytest.raises(AttemptSupersededError, match=f"{name(20)} was not published: another attempt"):
        made.wait_and_commit()
    assert made.find_latest() == (tmp_path / name(10), state(10))


def _save_failing(world: World, root: Path, error: Exception, rank: int) -> tuple[str, bool, list[str]]:
    """One rank's disk fails; what every rank makes of it."""
    made, heard = store(root, world=world), []
    made.save(Tensors(10, world.rank, world.size), state(10))
    made.wait_and_commit()
    write = module.write_chunks
    if world.rank == rank:
        module.write_chunks = failing(error)
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("foveal.checkpoint").addHandler(handler)
    try:
        made.save(Tensors(20, world.rank, world.size), state(20))
        said = str(made.wait_and_commit())
    except (RuntimeError, ValueError) as caught:
        said = repr(caught)
    finally:
        module.write_chunks = write
        logging.getLogger("foveal.checkpoint").removeHandler(handler)
    return said, made.is_save_pending, heard


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_is_known_to_all(two_ranks: Ranks, tmp_path: Path, rank: int) -> None:
    answers = two_ranks.call(_save_failing, tmp_path, OSError(122, "Disk quota exceeded"), rank)
    for said, pending, heard in answers:
        assert (said, pending) == ("None", False)
        assert len(heard) == 1
        assert heard[0].startswith(f"NO CHECKPOINT AT STEP 20: rank {rank}: Disk quota exceeded (")
    assert names(tmp_path) == [name(10)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_the_program_ends_every_rank(two_ranks: Ranks, tmp_path: Path, rank: int) -> None:
    answers = [said for said, _, _ in two_ranks.call(_save_failing, tmp_path, ValueError("broken"), rank)]
    assert answers[rank] == "ValueError('broken')"
    assert answers[1 - rank] == f"""RuntimeError("rank {rank}: ValueError('broken')")"""
