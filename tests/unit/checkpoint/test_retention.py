"""Which checkpoints stay and which go, and what is left of attempts that were killed."""

from pathlib import Path

import pytest
from stores import name, names, saved, state, store

from foveal.checkpoint import retention


def test_only_so_many_are_kept(tmp_path: Path) -> None:
    made = store(tmp_path, keep=2, keep_every=40)
    for step in range(0, 110, 10):
        saved(made, step)
    assert names(tmp_path) == [name(step) for step in (40, 80, 90, 100)]


@pytest.mark.parametrize(
    ("keep", "whole", "left"), [(1, 9, [40]), (9, 2.5, [30, 40]), (9, 0.1, [40]), (2, 9, [30, 40])]
)
def test_no_more_bytes_are_kept_than_wanted_but_always_the_newest(
    keep: int, whole: float, left: list[int], tmp_path: Path
) -> None:
    saved(store(tmp_path / "one"), 10)
    size = sum(file.stat().st_size for file in (tmp_path / "one" / name(10)).iterdir())
    made = store(tmp_path / "all", keep=keep, gigabytes=whole * size / 1e9)
    for step in (10, 20, 30, 40):
        saved(made, step)
    assert names(tmp_path / "all") == [name(step) for step in left]


def test_the_limit_goes_for_those_that_are_kept_every_so_often_too(tmp_path: Path) -> None:
    made = store(tmp_path, keep=1, keep_every=10, gigabytes=3500e-9)
    for step in (10, 20, 30, 40):
        saved(made, step)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in tmp_path.iterdir()]
    assert sum(sizes) <= 3500 < sum(sizes) + sizes[0]
    assert names(tmp_path)[-1] == name(40)


def test_what_is_void_or_torn_makes_way_first(tmp_path: Path) -> None:
    """Attempt 1 got further than attempt 2 began; the limit holds two and a half."""
    first = store(tmp_path)
    for step in (100, 400, 500):
        saved(first, step)
    size = sum(file.stat().st_size for file in (tmp_path / name(100)).iterdir())
    made = store(tmp_path, attempt=2, starts={1: 0, 2: 100}, keep=2, gigabytes=2.5 * size / 1e9)
    assert made.find_latest() == (tmp_path / name(100), state(100))
    for step in (150, 200):
        saved(made, step)
    assert names(tmp_path) == [name(150, attempt=2), name(200, attempt=2)]


def test_torn_ones_do_not_count_and_go_in_time(tmp_path: Path) -> None:
    first = store(tmp_path)
    for step in (10, 20, 30):
        saved(first, step)
    for step in (20, 30):
        (tmp_path / name(step) / "state.json").write_text("")
    made = store(tmp_path, attempt=2, keep=2, keep_every=10)
    assert made.find_latest() == (tmp_path / name(10), state(10))
    saved(made, 40)
    assert names(tmp_path) == [name(10), name(20), name(30), name(40, attempt=2)]
    saved(made, 50)
    assert names(tmp_path) == [name(10), name(40, attempt=2), name(50, attempt=2)]


def test_void_ones_do_not_count_and_go_in_time(tmp_path: Path) -> None:
    first = store(tmp_path)
    for step in (10, 20, 30):
        saved(first, step)
    made = store(tmp_path, attempt=3, starts={1: 0, 2: 10}, keep=1, keep_every=10)
    assert made.find_latest() == (tmp_path / name(10), state(10))
    saved(made, 20)
    assert names(tmp_path) == [name(10), name(20, attempt=3), name(30)]
    saved(made, 40)
    assert names(tmp_path) == [name(10), name(20, attempt=3), name(40, attempt=3)]


def test_nothing_of_a_later_attempt_is_touched(tmp_path: Path) -> None:
    """A superseded attempt that does not know it yet."""
    old, new = store(tmp_path, keep=1), store(tmp_path, attempt=2, keep=1)
    saved(old, 10)
    saved(new, 20)
    (tmp_path / f".draft-{name(30, attempt=2)}").mkdir()
    saved(old, 30)
    store(tmp_path)
    assert names(tmp_path) == [f".draft-{name(30, attempt=2)}", name(20, attempt=2), name(30)]


def test_who_was_superseded_removes_nothing(tmp_path: Path) -> None:
    made = store(tmp_path, keep=1)
    saved(made, 10)
    answers = iter([False, True])  # it was, between publishing and pruning
    made._superseded = lambda: next(answers)
    saved(made, 20)
    assert names(tmp_path) == [name(10), name(20)]


def test_what_killed_attempts_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    saved(store(tmp_path), 10)
    for left in (f".draft-{name(20)}", ".gone-0123", ".draft-notes"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text("")
    made = store(tmp_path, attempt=2)
    made.wait_and_commit()
    assert names(tmp_path) == [".draft-notes", name(10)]


@pytest.mark.parametrize("kill", [1, 2])
def test_killed_while_a_checkpoint_is_replaced_one_of_them_survives(
    kill: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing takes two renames; a kill before either leaves the old one or the new one, not nothing."""
    made = store(tmp_path)
    saved(made, 10)
    rename, calls = Path.rename, iter(range(1, 9))

    def killed(here: Path, there: Path) -> Path:
        if next(calls) == kill:
            raise KeyboardInterrupt
        return rename(here, there)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(made, 10)
    monkeypatch.undo()
    again = store(tmp_path, attempt=2)
    assert again.find_latest() == (tmp_path / name(10), state(10))
    again.wait_and_commit()
    assert names(tmp_path) == [name(10)]


def test_what_cannot_be_removed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(tmp_path, keep=1)
    saved(made, 10)
    rename = Path.rename

    def refused(here: Path, there: Path) -> Path:
        if here.name == name(10):
            raise PermissionError(13, "Permission denied")
        return rename(here, there)

    monkeypatch.setattr(Path, "rename", refused)
    saved(made, 20)
    assert made.latest_step == 20
    assert f"{tmp_path / name(10)} cannot be removed ([Errno 13] Permission denied)" in caplog.text


def test_half_deleted_ones_are_never_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder loses its name before its files: killed in between, it is none that a reader would look into."""
    monkeypatch.setattr(retention, "_delete_folders", lambda _: None)
    made = store(tmp_path, keep=1)
    saved(made, 10)
    saved(made, 20)
    gone, kept = names(tmp_path)
    assert (gone[:6], kept) == (".gone-", name(20))
