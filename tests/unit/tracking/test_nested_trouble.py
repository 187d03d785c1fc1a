"""Trials whose files change or are out of reach while they are delivered by hand, and a store that takes a part only."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_facts import KeptFacts, write_run_inputs
from nested_stores import Stores, check_delivered, steps
from points import row

from foveal.atomic import write_json
from foveal.tracking import nested
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.nested import SyncWithNested
from foveal.tracking.sync import RunSync
from foveal.tracking.sync_facts import FactsSync
from foveal.tracking.tail import MetricsTail
from foveal.tracking.tracker import TrackingConfig


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    """A run and its trial ``a``, both finished and delivered to nobody."""
    stores = Stores(tmp_path / "run")
    for folder in (stores.run, stores.run / "trials" / "a"):
        tracker = JsonlTracker(folder, 0)
        tracker.log_settings({"seed": 1}, {"attempt.started": "1"})
        tracker.log_rows([row(step) for step in range(1, 4)])
        write_json(folder / "finished.json", {})
        tracker.close("finished")
    return stores


@pytest.fixture
def by_hand(stores: Stores) -> Iterator[SyncWithNested]:
    sync = stores.sync_by_hand()
    yield sync
    sync.close()


def test_a_trial_that_is_taken_over_before_its_files_are_sent(stores: Stores, by_hand: SyncWithNested) -> None:
    """The last round has no next one, and a note that all is delivered would hide new rows from later attempts."""
    by_hand.upload_rows_and_tags()
    other = JsonlTracker(stores.run / "trials" / "a", 3)  # of another process
    other.log_rows([row(4)])
    by_hand.upload_files(final=True)
    assert steps(stores, "a") == {1, 2, 3, 4}
    assert not (stores.run / nested._DELIVERED).exists()
    other.close("saved-and-left")
    by_hand.upload_rows_and_tags()
    by_hand.upload_files(final=True)
    check_delivered(stores, "a", "saved-and-left")
    assert (stores.run / nested._DELIVERED).exists()


def test_a_trial_that_is_taken_over_before_its_rows_are_sent(
    stores: Stores, by_hand: SyncWithNested, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of its file and the first request."""
    others: list[JsonlTracker] = []
    make_nested = by_hand._make_nested

    def take_over(folder: Path, tail: MetricsTail) -> RunSync:
        if not others:
            others.append(JsonlTracker(folder, 2))
        return make_nested(folder, tail)

    monkeypatch.setattr(by_hand, "_make_nested", take_over)
    by_hand.upload_rows_and_tags()
    assert steps(stores, "a") == {1, 2}
    others[0].close("saved-and-left")


def test_a_file_system_that_is_away_for_a_moment_gives_no_trial_up(
    stores: Stores, by_hand: SyncWithNested, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(file))

    with monkeypatch.context() as patched:
        patched.setattr(nested, "read_step_rows", fail)
        with pytest.raises(OSError, match="Stale file handle"):
            by_hand.upload_rows_and_tags()
    by_hand.upload_rows_and_tags()
    by_hand.upload_files(final=True)
    check_delivered(stores, "a")
    assert not by_hand.given_up


def test_a_damaged_trial_is_remembered(stores: Stores, by_hand: SyncWithNested) -> None:
    trial = stores.run / "trials" / "a"
    (trial / "metrics.jsonl").write_text("{\n")
    by_hand.upload_rows_and_tags()
    assert by_hand.given_up == {trial}


def test_trials_come_before_facts_that_a_store_fails_at(stores: Stores) -> None:
    write_run_inputs(stores.run)
    sync = stores.sync_by_hand(FactsSync(stores.run, TrackingConfig(uri="sqlite:///x.db"), "here"))
    kept = stores.of("run").facts
    assert isinstance(kept, KeptFacts)

    def fail(verb: str) -> None:
        raise ConnectionError(verb)

    kept.before = fail
    with pytest.raises(ConnectionError):
        sync.upload_rows_and_tags()
    assert steps(stores, "a") == {1, 2, 3}
    sync.close()
