"""The index of a checkpoint: it is what the files' headers say, and file operations grow with ranks, not their square."""

import json
from collections import Counter
from pathlib import Path

import pytest
from stores import Tensors, name, state, store
from thread_ranks import FileOperations, ThreadWorld, run_ranks

from foveal.atomic import write_json
from foveal.checkpoint.chunk_index import ChunkIndex
from foveal.checkpoint.saver import CheckpointSaver


def save(world: ThreadWorld, root: Path, *steps: int) -> CheckpointSaver:
    saver = CheckpointSaver(store(root, world=world))
    for step in steps:
        saver.save(Tensors(step, world.rank, world.size), state(step))
        saver.wait_and_commit()
    return saver


def resume(world: ThreadWorld, root: Path) -> set[float]:
    checkpoints, engine = store(root, attempt=2, world=world), Tensors(0, world.rank, world.size)
    latest = checkpoints.find_latest_valid()
    assert latest is not None
    checkpoints.load(latest[0], engine, latest[1])
    return engine.values()


@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_the_index_is_what_the_headers_of_all_files_say(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, lambda world: save(world, tmp_path, 10))
    folder = tmp_path / name(10)
    index = ChunkIndex.read(folder)
    (folder / "index.json").unlink()
    assert index == ChunkIndex.read(folder)
    assert index.shapes == {"embed": (7, 3), "head.bias": (5,)}
    assert len(index.stored["exp_avg", "embed"].starts) == min(ranks, 21)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_of_a_version_without_an_index_is_loaded(ranks: int, tmp_path: Path) -> None:
    run_ranks(2, lambda world: save(world, tmp_path, 10))
    folder = tmp_path / name(10)
    sums = json.loads((folder / "checksums.json").read_text())
    write_json(folder / "checksums.json", {file: digest for file, digest in sums.items() if file != "index.json"})
    (folder / "index.json").unlink()
    assert run_ranks(ranks, lambda world: resume(world, tmp_path)) == [{10.0}] * ranks


def count_operations(ranks: int, root: Path) -> dict[str, Counter[str]]:
    with pytest.MonkeyPatch.context() as patch:
        operations = FileOperations(root, patch)
        savers = run_ranks(ranks, lambda world: save(world, root, 10))
        operations.pop()
        run_ranks(ranks, lambda world: savers[world.rank].save(Tensors(20, world.rank, ranks), state(20)))
        run_ranks(ranks, lambda world: savers[world.rank].wait_and_commit())
        counts = {"save": operations.pop()}
        run_ranks(ranks, lambda world: resume(world, root))
        return counts | {"resume": operations.pop()}


def test_file_operations_of_a_save_and_a_resume_grow_with_the_ranks(tmp_path: Path) -> None:
    """A rank opens its own file and a few more, and rank 0 lists once for all."""
    few, many = (count_operations(ranks, tmp_path / str(ranks)) for ranks in (8, 32))
    for action, per_rank in (("save", 2), ("resume", 2)):
        total = {ranks: sum(counts[action].values()) for ranks, counts in ((8, few), (32, many))}
        assert total[32] - total[8] <= 24 * per_rank, (action, few[action], many[action])
        assert total[8] >= 8, "each rank opens a file"
