"""Which checkpoints are kept and removed, and the cleanup after killed attempts."""

from pathlib import Path

import pytest
from stores import name, names, saved, state, store

from foveal.checkpoint import retention

WAIT = 60  # seconds for the thread that removes folders


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=2, keep_every=40)
    for step in range(0, 110, 10):
        saved(checkpoints, step)
    assert names(tmp_path) == [name(step) for step in (40, 80, 90, 100)]


@pytest.mark.parametrize(
    ("keep", "limit", "steps"), [(1, 9, [40]), (9, 2.5, [30, 40]), (9, 0.1, [40]), (2, 9, [30, 40])]
)
def test_no_more_bytes_are_kept_than_wanted_but_always_the_newest(
    keep: int, limit: float, steps: list[int], tmp_path: Path
) -> None:
    """The limit is in units of a checkpoint's size."""
    saved(store(tmp_path / "one"), 10)
    size = sum(file.stat().st_size for file in (tmp_path / "one" / name(10)).iterdir())
    checkpoints = store(tmp_path / "all", keep=keep, max_gigabytes=limit * size / 1e9)
    for step in (10, 20, 30, 40):
        saved(checkpoints, step)
    assert names(tmp_path / "all") == [name(step) for step in steps]


def test_the_limit_goes_for_those_that_are_kept_every_so_often_too(tmp_path: Path) -> None:
    saved(store(tmp_path / "one"), 10)
    limit = 2.5 * sum(file.stat().st_size for file in (tmp_path / "one" / name(10)).iterdir())
    checkpoints = store(tmp_path / "all", keep=1, keep_every=10, max_gigabytes=limit / 1e9)
    for step in (10, 20, 30, 40):
        saved(checkpoints, step)
    assert names(tmp_path / "all") == [name(30), name(40)]


def test_what_is_void_or_torn_makes_way_first(tmp_path: Path) -> None:
    """Attempt 1 saved past the first step of attempt 2; the limit is the size of 2.5 checkpoints."""
    first = store(tmp_path)
    for step in (100, 400, 500):
        saved(first, step)
    size = sum(file.stat().st_size for file in (tmp_path / name(100)).iterdir())
    checkpoints = store(tmp_path, attempt=2, starts={1: 0, 2: 100}, keep=2, max_gigabytes=2.5 * size / 1e9)
    assert checkpoints.find_latest_valid() == (tmp_path / name(100), state(100))
    for step in (150, 200):
        saved(checkpoints, step)
    assert names(tmp_path) == [name(150, attempt=2), name(200, attempt=2)]


def test_torn_ones_do_not_count_and_go_in_time(tmp_path: Path) -> None:
    first = store(tmp_path)
    for step in (10, 20, 30):
        saved(first, step)
    for step in (20, 30):
        (tmp_path / name(step) / "state.json").write_text("")
    checkpoints = store(tmp_path, attempt=2, keep=2, keep_every=10)
    assert checkpoints.find_latest_valid() == (tmp_path / name(10), state(10))
    saved(checkpoints, 40)
    assert names(tmp_path) == [name(10), name(20), name(30), name(40, attempt=2)]
    saved(checkpoints, 50)
    assert names(tmp_path) == [name(10), name(40, attempt=2), name(50, attempt=2)]


def test_void_ones_do_not_count_and_go_in_time(tmp_path: Path) -> None:
    first = store(tmp_path)
    for step in (10, 20, 30):
        saved(first, step)
    checkpoints = store(tmp_path, attempt=3, starts={1: 0, 2: 10}, keep=1, keep_every=10)
    assert checkpoints.find_latest_valid() == (tmp_path / name(10), state(10))
    saved(checkpoints, 20)
    assert names(tmp_path) == [name(10), name(20, attempt=3), name(30)]
    saved(checkpoints, 40)
    assert names(tmp_path) == [name(10), name(20, attempt=3), name(40, attempt=3)]


def test_nothing_of_a_later_attempt_is_touched(tmp_path: Path) -> None:
    """A superseded attempt that has not noticed yet leaves newer attempts' folders untouched."""
    old, new = store(tmp_path, keep=1), store(tmp_path, attempt=2, keep=1)
    saved(old, 10)
    saved(new, 20)
    (tmp_path / f".draft-{name(30, attempt=2)}").mkdir()
    saved(old, 30)
    store(tmp_path)
    assert names(tmp_path) == [f".draft-{name(30, attempt=2)}", name(20, attempt=2), name(30)]


def test_who_was_superseded_removes_nothing(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=1)
    saved(checkpoints, 10)
    answers = iter([False, True])  # superseded between publishing and pruning
    saved(checkpoints, 20, is_superseded=lambda: next(answers))
    assert names(tmp_path) == [name(10), name(20)]


def test_what_killed_attempts_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    saved(store(tmp_path), 10)
    for folder in (f".draft-{name(20)}", ".gone-0123", ".draft-notes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("")
    checkpoints = store(tmp_path, attempt=2)
    checkpoints.directory.wait_for_removal(WAIT)
    assert names(tmp_path) == [".draft-notes", name(10)]


@pytest.mark.parametrize("kill", [1, 2])
def test_killed_while_a_checkpoint_is_replaced_one_of_them_survives(
    kill: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replacement takes two renames; after a kill before either, the old or the new checkpoint exists."""
    checkpoints = store(tmp_path)
    saved(checkpoints, 10)
    rename, calls = Path.rename, iter(range(1, 9))

    def killed(source: Path, target: Path) -> Path:
        if next(calls) == kill:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(checkpoints, 10)
    monkeypatch.undo()
    restarted = store(tmp_path, attempt=2)
    assert restarted.find_latest_valid() == (tmp_path / name(10), state(10))
    restarted.directory.wait_for_removal(WAIT)
    assert names(tmp_path) == [name(10)]


def test_what_cannot_be_removed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = store(tmp_path, keep=1)
    saved(checkpoints, 10)
    rename = Path.rename

    def refused(source: Path, target: Path) -> Path:
        if source.name == name(10):
            raise PermissionError(13, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refused)
    saved(checkpoints, 20)
    assert checkpoints.latest_step == 20
    assert f"{tmp_path / name(10)} cannot be removed ([Errno 13] Permission denied)" in caplog.text


def test_half_deleted_ones_are_never_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is renamed before its files are deleted, so that a kill in between leaves no partial checkpoint."""
    monkeypatch.setattr(retention, "_delete_folders", lambda _: None)
    checkpoints = store(tmp_path, keep=1)
    saved(checkpoints, 10)
    saved(checkpoints, 20)
    removed, newest = names(tmp_path)
    assert (removed[:6], newest) == (".gone-", name(20))
