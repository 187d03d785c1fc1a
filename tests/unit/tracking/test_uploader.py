"""The courier against a store that a test can break: what arrives, what is asked, what is said, and that nobody waits."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from clock import Clock
from fake_store import Kept
from points import in_jsonl, row
from uploads import WAIT, deliver, kill, opened, train, until

from foveal.atomic import AppendLog
from foveal.tracking import sync, uploader
from foveal.tracking.sync import _list_files_to_upload, _remote_folder
from foveal.tracking.tracker import summarize_error
from foveal.tracking.uploader import OutageBackoff

_USER = "me:secret"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sync, "_MAX_VALUES", 12)
    for name, seconds in {"_ROUND_SECONDS": 0.0, "_MIN_WAIT": 0.002, "_MAX_WAIT": 0.01}.items():
        monkeypatch.setattr(uploader, name, seconds)
    caplog.set_level(logging.INFO, "foveal")


@pytest.fixture
def store() -> Iterator[Kept]:
    store = Kept()
    yield store
    for kept in store.written:  # an attempt that ended without a word
        kept._stream.close()


def fails(draw: random.Random, share: float) -> Callable[[str], None]:
    def now_and_then(verb: str) -> None:
        if draw.random() < share:
            raise ConnectionError(f"{verb}: gone")

    return now_and_then


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == level]


@pytest.mark.parametrize("seed", range(6))
def test_each_number_once_whatever_fails(seed: int, store: Kept, tmp_path: Path) -> None:
    """Requests fail before and after they were carried out, and attempts end anywhere: with all delivered, or without a word."""
    draw, trouble = random.Random(seed), random.Random(seed)  # of this thread, and of the uploaders'
    store.before, store.after = fails(trouble, 0.3), fails(trouble, 0.3)
    checkpoint = 0
    for _ in range(5):
        tracker = opened(tmp_path, store, checkpoint)
        last = checkpoint + draw.randrange(5, 40)
        train(tracker, checkpoint + 1, last, report=draw.choice([3, 5]))
        if draw.random() < 0.5:
            tracker.close("saved-and-left")
        else:
            kill(tracker, store)
        checkpoint = draw.randrange(checkpoint, last + 1)
    tracker = opened(tmp_path, store, checkpoint)
    train(tracker, checkpoint + 1, checkpoint + 20)
    tracker.close("finished")
    ours, theirs = in_jsonl(tmp_path), store.numbers()
    assert {place: theirs.get(place) for place in ours} == ours
    assert store.tags == {"ranks": "1", "state": "finished", "why_stopped": "finished"}
    assert (store.settings, store.artifacts.keys()) == ({"seed": 3}, {"settings.json"})


def test_one_of_the_names_that_come_together_is_asked_for(store: Kept, tmp_path: Path) -> None:
    first = opened(tmp_path, store)
    train(first, 1, 30)
    first.close("failed")
    assert store.asked == []
    second = opened(tmp_path, store, 20)
    train(second, 21, 40)
    second.log_rows([row(step) for step in range(41, 81)])
    second.close("finished")
    assert sorted(store.asked) == ["system/images_per_second", "train/loss"]
    assert all(len(values) == 1 for values in store.numbers().values())
    assert max(store.requests) == 12


def test_a_report_at_another_step_arrives_too(store: Kept, tmp_path: Path) -> None:
    """The rows are there, without the numbers that only the repetition had."""
    first = opened(tmp_path, store)
    train(first, 1, 9, report=4)
    first.close("failed")
    second = opened(tmp_path, store, 2)
    train(second, 3, 9, report=3)
    second.close("finished")
    found = store.numbers()
    assert {step for name, step in found if name == "system/images_per_second"} == {3, 4, 6, 8, 9}
    assert all(len(values) == 1 for values in found.values())


def test_what_was_delivered_before_the_run_went_back_comes_again(store: Kept, tmp_path: Path) -> None:
    tracker = opened(tmp_path, store)
    train(tracker, 1, 30)
    until(lambda: store.tags and ("val/top1", 30) in store.numbers())
    AppendLog(tmp_path / "rollbacks.jsonl").append_json_lines([{"time": time.time(), "to": 20}])
    tracker.rewind(20)
    tracker.log_rows([{"step": step, "loss": 9.0} for step in range(21, 26)])
    until(lambda: store.numbers()[("train/loss", 25)] == [1 / 25, 9.0])
    store.before = fails(random.Random(0), 0.5)
    again = opened(tmp_path, store, 22)
    again.log_rows([{"step": step, "loss": 9.0} for step in range(23, 41)])
    again.close("finished")
    losses = {step: values for (name, step), values in store.numbers().items() if name == "train/loss"}
    assert losses == {
        step: [1 / step] if step <= 20 else [1 / step, 9.0] if step <= 30 else [9.0] for step in range(1, 41)
    }


def test_a_row_that_is_cut_while_it_waits_is_never_sent(store: Kept, tmp_path: Path) -> None:
    away = threading.Event()
    store.before = lambda _: away.wait(WAIT)
    tracker = opened(tmp_path, store)
    tracker.log_rows([row(step) for step in range(1, 31)])
    tracker.rewind(10)
    tracker.log_rows([{"step": step, "loss": 9.0} for step in range(11, 21)])
    away.set()
    tracker.close("finished")
    assert store.numbers() == in_jsonl(tmp_path)


def test_a_file_that_is_cut_while_rows_are_on_their_way(store: Kept, tmp_path: Path) -> None:
    """Those rows arrive in vain, and what has their place in the file is delivered all the same."""
    under_way, away = threading.Event(), threading.Event()

    def hold(verb: str) -> None:
        if verb == "send":
            under_way.set()
            away.wait(WAIT)

    store.before = hold
    tracker = opened(tmp_path, store)
    tracker.log_rows([row(step) for step in range(1, 31)])
    assert under_way.wait(WAIT)
    AppendLog(tmp_path / "rollbacks.jsonl").append_json_lines([{"time": time.time(), "to": 2}])
    tracker.rewind(2)
    tracker.log_rows([{"step": step, "loss": 9.0} for step in range(3, 11)])
    away.set()
    tracker.close("finished")
    losses = {step: values for (name, step), values in store.numbers().items() if name == "train/loss"}
    assert losses == {
        step: [1 / step] if step <= 2 else [1 / step, 9.0] if step <= 6 else [9.0] for step in range(1, 11)
    }


def test_training_does_not_wait_for_a_store_that_hangs(store: Kept, tmp_path: Path, caplog) -> None:
    away = threading.Event()
    store.before = lambda _: away.wait()
    tracker = opened(tmp_path, store, patience=0.05)
    train(tracker, 1, 200)
    tracker.log_file(tmp_path / "settings.json")
    tracker.close("finished")
    (warning,) = said(caplog, logging.WARNING)
    assert warning.startswith(
        f"tracking: 201 rows of {tmp_path}, or its files, are not delivered; foveal track sync {tmp_path} "
    )
    assert store.points == []
    away.set()


def test_an_outage_is_one_warning_and_one_line(store: Kept, tmp_path: Path, caplog) -> None:
    tracker = opened(tmp_path, store)
    train(tracker, 1, 10)
    deliver(tracker, store, 11)
    attempts: list[str] = []

    def away(verb: str) -> None:
        attempts.append(verb)
        raise ConnectionError(f"http://{_USER}@there/ is gone " + "x" * 500)

    store.before = away
    tracker.log_rows([row(11)])
    until(lambda: len(attempts) > 10)
    tracker.log_rows([row(12)])
    store.before = lambda _: None
    until(lambda: ("train/loss", 12) in store.numbers())
    tracker.close("finished")
    (warning,), (back,) = said(caplog, logging.WARNING), said(caplog, logging.INFO)
    assert warning.startswith("tracking: MLflow at here does not answer (ConnectionError: http://there/ is gone xxx")
    assert len(warning) < 500
    assert back == "tracking: MLflow at here answers again; 2 rows were behind"


def test_a_store_that_goes_away_between_rows_is_not_taken_for_its_files(store: Kept, tmp_path: Path, caplog) -> None:
    tracker = opened(tmp_path, store)
    train(tracker, 1, 10)
    deliver(tracker, store, 11)
    store.before = fails(random.Random(0), 1.0)
    tracker.log_file(tmp_path / "settings.json")
    until(lambda: said(caplog, logging.WARNING))
    store.before = lambda _: None
    tracker.close("finished")
    (warning,) = said(caplog, logging.WARNING)
    assert warning.startswith("tracking: MLflow at here does not answer (ConnectionError: connect: gone)")


def test_a_store_of_files_that_fails_holds_up_no_number(store: Kept, tmp_path: Path, caplog, monkeypatch) -> None:
    tries: list[str] = []

    def refuse(verb: str) -> None:
        if verb == "file":
            tries.append(verb)
            raise PermissionError("no bucket")

    monkeypatch.setattr(uploader, "_MIN_WAIT", 0.3)
    monkeypatch.setattr(uploader, "_MAX_WAIT", 60.0)
    store.before = refuse
    tracker = opened(tmp_path, store, patience=0.05)
    train(tracker, 1, 30)
    for step in range(31, 61):
        tracker.log_rows([row(step)])
        until(lambda step=step: ("train/loss", step) in store.numbers())
    until(lambda: tracker._uploader.sync.count_pending_rows() == 0)
    assert len(tries) < 10  # of 30 rounds and more
    until(lambda: said(caplog, logging.WARNING))
    tracker.close("finished")
    assert store.numbers() == in_jsonl(tmp_path)
    first, last = said(caplog, logging.WARNING)
    assert first.startswith(
        "tracking: the store of MLflow's files at here does not answer (PermissionError: no bucket)"
    )
    assert last.startswith(f"tracking: 0 rows of {tmp_path}, or its files, are not delivered; foveal track sync")


def test_a_superseded_attempt_delivers_nothing_more(store: Kept, tmp_path: Path, caplog) -> None:
    old = opened(tmp_path, store)
    train(old, 1, 10)
    until(lambda: ("val/top1", 10) in store.numbers())
    new = opened(tmp_path, store, 5)
    old.log_rows([row(step) for step in range(11, 20)])
    old.close("superseded", "attempt 2 has begun")
    train(new, 6, 12)
    new.close("finished")
    assert store.numbers() == in_jsonl(tmp_path) | {("val/top1", 10): [0.5]}
    assert store.tags["state"] == "finished"
    assert said(caplog, logging.WARNING) == []
    assert [line for line in said(caplog, logging.INFO) if "taken" in line] == [
        f"tracking: another attempt has taken {tmp_path} over; this one delivers nothing more"
    ]


def test_a_store_that_lost_the_run_gets_all_of_it(store: Kept, tmp_path: Path) -> None:
    tracker = opened(tmp_path, store)
    train(tracker, 1, 10)
    deliver(tracker, store, 11)
    store.run_id, store.points, store.artifacts = "2", [], {}
    store.before = fails(random.Random(1), 0.5)
    until(lambda: tracker.log_rows([row(11)]) or store.points)
    store.before = lambda _: None
    tracker.close("finished")
    assert {name for name, _, _, step in store.points if step == 3} == {"train/loss", "update/lr"}
    assert "settings.json" in store.artifacts


def test_waits_grow_to_a_limit_and_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploader, "_MIN_WAIT", 1.0)
    monkeypatch.setattr(uploader, "_MAX_WAIT", 60.0)
    clock = Clock()
    monkeypatch.setattr(uploader, "time", SimpleNamespace(monotonic=clock))
    outage, waits = OutageBackoff("it"), []
    for _ in range(9):
        outage.record_failure(ConnectionError(), clock())
        waits.append(outage.seconds_until_retry)
        clock.pass_(1.0)
    assert outage.outage_seconds == 9.0
    for wait, longest in zip(waits, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert longest / 2 <= wait <= longest
    outage.record_success("nothing")
    assert (outage.seconds_until_retry, outage.outage_seconds) == (0.0, 0.0)
    outage.record_failure(ConnectionError(), clock())
    assert outage.seconds_until_retry <= 1


def test_no_password_is_said() -> None:
    error = ConnectionError(f"cannot reach https://{_USER}@mlflow.example.org/api\n  or http://{_USER}@x")
    assert summarize_error(error) == "ConnectionError: cannot reach https://mlflow.example.org/api or http://x"


def test_cards_of_several_exports_do_not_replace_each_other(tmp_path: Path) -> None:
    for name in ("small", "wide"):
        (tmp_path / "export" / name).mkdir(parents=True)
        (tmp_path / "export" / name / "card.json").write_text("{}")
    cards = [each for each in _list_files_to_upload(tmp_path, {}) if each.exists()]
    assert [_remote_folder(card) for card in cards] == ["small", "wide"]
    assert _remote_folder(tmp_path / "export" / "card.json") == ""
    assert _remote_folder(tmp_path / "pictures" / "a.png") == "pictures"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_store_that_answers_no_is_not_silent(status: int, store: Kept, tmp_path: Path, caplog) -> None:
    """What it says is said at once and once; training goes on, and the end does not wait for another answer."""
    tracker = opened(tmp_path, store, patience=600.0)
    train(tracker, 1, 10)
    deliver(tracker, store, 11)
    tries: list[str] = []

    def refuse(verb: str) -> None:
        tries.append(verb)
        error = ConnectionError(f"{status} said http://{_USER}@there/")
        error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined] - as requests does
        raise error

    store.before = refuse
    tracker.log_rows([row(11)])
    until(lambda: len(tries) > 5)
    tracker.log_rows([row(12)])
    began = time.monotonic()
    tracker.close("finished")
    assert time.monotonic() - began < WAIT
    first, last = said(caplog, logging.WARNING)
    assert first == (
        f"tracking: MLflow at here refuses: ConnectionError: {status} said http://there/ "
        "(metrics.jsonl has every number, and it is tried again now and then)"
    )
    assert "does not answer" not in caplog.text
    assert last.startswith(f"tracking: 2 rows of {tmp_path}, or its files, are not delivered")
