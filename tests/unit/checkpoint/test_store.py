"""The checkpoint store: atomic saves, verified loads, several attempts, on one and two ranks."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ranks
from stores import SCIENCE, Tensors, name, names, saved, state, store

from foveal.atomic import atomic_folder, sha256, write_json
from foveal.checkpoint import digests
from foveal.checkpoint.saver import CheckpointSaver, SaveResult
from foveal.checkpoint.state import TrainState, check_science_unchanged, read_train_state
from foveal.distributed.world import World
from foveal.errors import CheckpointError, StorageUnreachableError

CHUNKS = "pieces-00000.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with complete checkpoints at steps 10 and 20."""
    checkpoints = store(tmp_path)
    saved(checkpoints, 10)
    saved(checkpoints, 20)
    return tmp_path


def test_what_was_saved_is_found_and_fills_an_engine(two: Path) -> None:
    checkpoints, engine = store(two, attempt=2), Tensors(0)
    assert checkpoints.find_latest_valid() == (two / name(20), state(20))
    checkpoints.load(two / name(20), engine, state(20))
    assert (engine.values(), engine.num_updates) == ({20.0}, 20)
    assert sorted(json.loads((two / name(20) / "checksums.json").read_text())) == ["index.json", CHUNKS, "state.json"]
    assert checkpoints.latest_step == 20


def test_a_state_of_an_older_version_lacks_fields(two: Path) -> None:
    file = two / name(20) / "state.json"
    tree = json.loads(file.read_text())
    write_json(file, {key: value for key, value in tree.items() if key not in ("rounding", "scores")})
    assert "rounding" in tree
    assert read_train_state(two / name(20)) == state(20)


def test_a_folder_that_cannot_be_listed_tears_no_checkpoint(two: Path, monkeypatch) -> None:
    checkpoints = store(two)
    usable = checkpoints._list_usable()
    monkeypatch.setattr(checkpoints, "_list_usable", lambda: usable)
    refusal = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(os, "scandir", lambda _: (_ for _ in ()).throw(refusal))
    monkeypatch.setattr(digests, "_PAUSES", (0.0, 0.0, 0.0))
    with pytest.raises(StorageUnreachableError, match=f"{name(20)} cannot be read"):
        checkpoints.find_latest_valid()


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    assert store(tmp_path / "new").find_latest_valid() is None


def cut(folder: Path) -> None:
    file = folder / CHUNKS
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder: Path) -> None:
    (folder / CHUNKS).write_bytes(b"")


def flip(file: str) -> Callable[[Path], None]:
    def one_bit(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data)

    return one_bit


def lose(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def lose_all_but_the_list(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != "checksums.json":
            file.unlink()


HARM = {
    "cut short": cut,
    "empty": empty,
    "one bit of the weights": flip(CHUNKS),
    "one bit of the state": flip("state.json"),
    "one bit of the index": flip("index.json"),
    "one bit of the list": flip("checksums.json"),
    "the weights lost": lose(CHUNKS),
    "the state lost": lose("state.json"),
    "the index lost": lose("index.json"),
    "the list lost": lose("checksums.json"),
    "all but the list deleted": lose_all_but_the_list,
    "everything deleted": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "a list cut short": lambda folder: (folder / "checksums.json").write_text("{"),
    "one file too many": lambda folder: (folder / "late.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_what_is_not_whole_is_passed_over(
    harm: Callable[[Path], None], two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(two / name(20))
    assert store(two).find_latest_valid() == (two / name(10), state(10))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"checkpoint {two / name(20)} is torn or corrupt; the one before it is used"]


def test_where_none_is_whole_the_run_does_not_begin_anew_by_itself(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in two.iterdir():
        cut(folder)
    with pytest.raises(CheckpointError, match=r"is whole: restore one, .* or begin anew with run\.fresh=true"):
        store(two).find_latest_valid()
    assert len(caplog.records) == 2


def test_where_all_are_void_or_gone_the_run_does_not_begin_anew_by_itself(two: Path) -> None:
    """A later attempt began at step 5 from a lost checkpoint; a start at 0 would invalidate all later checkpoints."""
    gone_back = store(two, attempt=3, starts={1: 0, 2: 5})
    with pytest.raises(
        CheckpointError, match=rf"began at step 5 \(past where a later one began: {name(10)}, {name(20)}\)"
    ):
        gone_back.find_latest_valid()
    shutil.rmtree(two)
    with pytest.raises(
        CheckpointError, match=r"is whole, and an attempt at this run began at step 5: restore one, check"
    ):
        store(two, attempt=3, starts={1: 0, 2: 5}).find_latest_valid()
    assert store(two, attempt=2, starts={1: 0}).find_latest_valid() is None, "the run was killed before its first save"


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("times", [2, 99])
def test_storage_that_does_not_answer_tears_no_checkpoint(code: int, times: int, two: Path, monkeypatch) -> None:
    """A skipped checkpoint is invalid for good: reads are retried, then the start fails without a skip."""
    failing(monkeypatch, code, times)
    if times == 2:
        assert store(two).find_latest_valid() == (two / name(20), state(20))
    else:
        with pytest.raises(StorageUnreachableError, match=f"{name(20)} cannot be read"):
            store(two).find_latest_valid()


def test_a_sector_that_is_lost_tears_one(two: Path, monkeypatch) -> None:
    failing(monkeypatch, errno.EIO, 99, only=name(20))
    assert store(two).find_latest_valid() == (two / name(10), state(10))


def failing(monkeypatch: pytest.MonkeyPatch, code: int, times: int, only: str = "step") -> None:
    """Make the first ``times`` digests of files under ``only`` fail."""
    remaining = [times]

    def digest(file: Path) -> str:
        if only in str(file) and remaining[0]:
            remaining[0] -= 1
            raise OSError(code, os.strerror(code))
        return sha256(file)

    monkeypatch.setattr(digests, "sha256", digest)
    monkeypatch.setattr(digests, "_PAUSES", (0.0, 0.0, 0.0))


def test_a_torn_one_is_replaced_by_the_next_save(two: Path) -> None:
    cut(two / name(20))
    checkpoints = store(two)
    saved(checkpoints, 20)
    assert checkpoints.find_latest_valid() == (two / name(20), state(20))
    assert names(two) == [name(10), name(20)]


def test_a_copy_under_another_name_is_nobodys_business(two: Path) -> None:
    copies = [f"{name(10)}.safe", "step-backup", "step-00000030"]
    for copy in copies:
        shutil.copytree(two / name(10), two / copy)
    checkpoints = store(two, keep=1)
    assert checkpoints.find_latest_valid() == (two / name(20), state(20))
    saved(checkpoints, 30)
    assert names(two) == sorted([*copies, name(30)])


def test_the_newest_is_so_by_number(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in (99_999_999, 100_000_000):
        saved(checkpoints, step)
    assert checkpoints.find_latest_valid() == (tmp_path / name(100_000_000), state(100_000_000))


def test_another_format_is_refused_by_number(two: Path) -> None:
    folder = two / name(20)
    tree = json.loads((folder / "state.json").read_text()) | {"format": 7}
    write_json(folder / "state.json", tree)
    sums = json.loads((folder / "checksums.json").read_text())
    write_json(folder / "checksums.json", sums | {"state.json": sha256(folder / "state.json")})
    with pytest.raises(CheckpointError, match=rf"{name(20)} has checkpoint format 7; this foveal reads format 2$"):
        store(two).find_latest_valid()


def test_the_format_before_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000020").mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000020 has checkpoint format 1, .* reads format 2: .*run.fresh"):
        store(tmp_path).find_latest_valid()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints cannot be written .*; set run.dir"):
        store(tmp_path / "file" / "checkpoints")


def test_other_science_is_named_with_both_values(tmp_path: Path) -> None:
    check_science_unchanged(SCIENCE, dict(SCIENCE), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"a foveal version without mixup, random_erasing; continue with that version"
    ):
        check_science_unchanged(SCIENCE, SCIENCE | {"mixup": 0.0, "random_erasing": 0.0}, tmp_path)
    with pytest.raises(CheckpointError, match=r"other science: attack\.kind \(was None, is 'pgd'\)"):
        check_science_unchanged(SCIENCE | {"attack": None}, SCIENCE | {"attack.kind": "pgd"}, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        check_science_unchanged(SCIENCE | {"gone": 1}, SCIENCE | {"seed": 4, "new": None, "more": "x"}, tmp_path)
    assert "gone (was 1, is None), more (was None, is 'x'), seed (was 3, is 4)" in str(caught.value)
    assert "optim.betas" not in str(caught.value)


def test_a_draft_that_fails_leaves_what_was(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with atomic_folder(folder) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as draft:
        (draft / "a").rename(draft / "b")
    assert (folder / "a").read_text() == "old"
    with atomic_folder(folder) as draft:
        (draft / "b").write_text("new")
    assert names(folder) == ["b"]
    assert names(tmp_path) == ["export"]


# --- several attempts ---


def test_what_a_later_attempt_went_back_behind_is_void(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Attempt 2 skipped a corrupt step 20 and began at 10; attempt 1 had not noticed and published 30."""
    saved(store(two), 30)
    caplog.set_level(logging.INFO)
    late = store(two, attempt=3, starts={1: 0, 2: 10})
    assert late.find_latest_valid() == (two / name(10), state(10))
    (record,) = [record for record in caplog.records if record.name.startswith("foveal.checkpoint")]
    assert record.levelno == logging.INFO
    assert f"{two / name(20)}, {two / name(30)}" in record.getMessage()
    saved(store(two, attempt=2, starts={1: 0, 2: 10}), 20)
    assert store(two, attempt=3, starts={1: 0, 2: 10}).find_latest_valid() == (two / name(20, attempt=2), state(20))


def test_where_an_attempt_began_itself_counts_for_it_too(two: Path) -> None:
    """Step 20 was unreadable when attempt 2 began at 10; at a later roll-back step 20 stays invalid."""
    checkpoints = store(two, attempt=2)
    file = two / name(20) / "state.json"
    text = file.read_text()
    file.write_text("")
    assert checkpoints.find_latest_valid() == (two / name(10), state(10))
    file.write_text(text)
    assert checkpoints.find_latest_valid() == (two / name(10), state(10))


def test_of_two_at_the_same_step_the_later_attempt_counts(two: Path) -> None:
    late = store(two, attempt=2, starts={1: 0})
    late.find_latest_valid()
    saved(late, 20)
    assert late.find_latest_valid() == (two / name(20, attempt=2), state(20))
    assert names(two) == [name(10), name(20), name(20, attempt=2)]


# --- on two ranks ---


def _save(world: World, root: Path, step: int) -> SaveResult | None:
    saver = CheckpointSaver(store(root, world=world))
    saver.save(Tensors(step, world.rank, world.size, num_updates=step), state(step))
    return saver.wait_and_commit()


def _newest(world: World, root: Path) -> tuple[Path, TrainState] | None:
    return store(root, world=world).find_latest_valid()


def _load(world: World, root: Path) -> tuple[set[float], int]:
    checkpoints, engine = store(root, world=world), Tensors(0, world.rank, world.size)
    latest = checkpoints.find_latest_valid()
    assert latest is not None
    checkpoints.load(latest[0], engine, latest[1])
    return engine.values(), engine.num_updates


def test_two_ranks_agree_on_what_is_whole(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.call(_newest, tmp_path) == [None, None]
    for step in (10, 20, 30):
        first, second = two_ranks.call(_save, tmp_path, step)
        assert first == second  # times of the slowest rank, so that all ranks decide alike
    last = tmp_path / name(30)
    assert sorted(json.loads((last / "checksums.json").read_text())) == [
        "index.json",
        CHUNKS,
        "pieces-00001.safetensors",
        "state.json",
    ]
    assert two_ranks.call(_newest, tmp_path) == [(last, state(30))] * 2
    flip("pieces-00001.safetensors")(last)  # only the rank that reads this file detects the damage
    flip(CHUNKS)(tmp_path / name(20))
    assert two_ranks.call(_newest, tmp_path) == [(tmp_path / name(10), state(10))] * 2


def test_two_ranks_go_on_from_one_and_one_from_two(two_ranks: Ranks, one_rank: Ranks, tmp_path: Path) -> None:
    two_ranks.call(_save, tmp_path, 10)
    assert one_rank.call(_load, tmp_path) == [({10.0}, 10)]
    one_rank.call(_save, tmp_path, 20)
    assert two_ranks.call(_load, tmp_path) == [({20.0}, 20)] * 2


def test_other_science_says_what_can_be_done(tmp_path: Path) -> None:
    saved_science = {"epochs": 4, "init": None}
    current = {"epochs": 6, "init": None}
    sentence = (
        r"other science: epochs \(was 4, is 6\); set it back, or start anew with another run\.dir or run\.fresh=true"
    )
    fork = rf"; run\.fork={tmp_path} with another run\.dir goes on from its newest checkpoint under the new settings"
    with pytest.raises(CheckpointError, match=rf"{sentence}{fork}$"):
        check_science_unchanged(saved_science, current, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{sentence}{fork}$"):
        check_science_unchanged(saved_science, current, tmp_path / "checkpoints" / "step-00000004-attempt-0001")
    with pytest.raises(CheckpointError, match=r"model\.depth \(was 2, is 3\); set it back.*run\.fresh=true$"):
        check_science_unchanged({"model.depth": 2}, {"model.depth": 3}, tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "card.json").touch()
    with pytest.raises(CheckpointError, match=rf"{sentence}; init={tmp_path}/export gives the new run the weights"):
        check_science_unchanged(saved_science, current, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no settings of the run"):
        check_science_unchanged(["epochs"], current, tmp_path)  # pyright: ignore[reportArgumentType]
