"""Whatever befalls an MLflow server, training goes on, and in the end the server has every number once.

The server is a real one. Training is a loop that writes rows through the tracker as fast as it can.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow_server import Server, Spoiler
from points import comparable, in_jsonl, in_mlflow, run_id
from processes import PYTHON, ROOT, Ended, Started, ended
from typer.testing import CliRunner

from foveal.cli import app
from foveal.errors import FovealError
from foveal.tracking import open_tracker, sync, uploader
from foveal.tracking.mlflow import MLflowRun
from foveal.tracking.store_errors import explain_refusal
from foveal.tracking.tracker import AttemptState, MetricRow, Tracker, TrackingConfig

pytestmark = [
    pytest.mark.slow,  # MLflow's server takes ten seconds to start
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

_LONG = 120.0  # seconds: a delivery on a busy machine
_STEPS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def healthy(server: Server) -> Server:
    """The server, up again if the test before has left it down."""
    if server.is_down:
        server.start()
    server.answers()
    return server


@pytest.fixture
def spoiler(healthy: Server) -> Iterator[Spoiler]:
    spoiler = Spoiler(healthy.port)
    yield spoiler
    spoiler.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Shorter waits between attempts, so that a test meets many; and as in the command line, the log says what happens."""
    monkeypatch.setattr(sync, "_MAX_VALUES", 60)  # in a request
    for name, seconds in {"_ROUND_SECONDS": 0.05, "_MIN_WAIT": 0.2, "_MAX_WAIT": 1.0}.items():
        monkeypatch.setattr(uploader, name, seconds)
    caplog.set_level(logging.INFO, "foveal")


def rows_of(first: int, last: int, salt: float = 0.0) -> list[MetricRow]:
    """The rows of some steps: now and then what is not finite, and in every tenth the numbers of a report."""
    rows = []
    for step in range(first, last + 1):
        loss = float("nan") if step % 97 == 0 else float("inf") if step % 89 == 0 else 1 / step + salt
        rows.append({"step": step, "loss": loss, "lr": step / 1000, "grad_norm": 1 + salt})
        if step % 10 == 0:
            rows[-1] |= {"images_per_second": 100.0 + step + salt, "bad_samples": 0.0}
    return rows


def train(
    tracker: Tracker, first: int, last: int, at: Mapping[int, Callable[[], object]] | None = None, pause: float = 0.01
) -> None:
    """Steps in reports of five, with an evaluation at every 50th; ``at`` is what happens at a step."""
    tracker.log_settings({"optim.lr": 0.1, "epochs": 3}, {"ranks": "1"}, ["optim.lr"])
    for step in range(first, last + 1, 5):
        tracker.log_rows(rows_of(step, min(step + 4, last)))
        if (step + 4) % 50 == 0:
            tracker.log_results_once({"val_top1": step / 1000}, step + 4)
        for when, act in (at or {}).items():
            if step <= when < step + 5:
                act()
        time.sleep(pause)


def configured(run: Path, uri: str, patience: float = _LONG) -> TrackingConfig:
    """The settings of a run's tracking, also in its config.yaml, as a stage leaves them."""
    run.mkdir(parents=True, exist_ok=True)
    tracking = {"uri": uri, "experiment": "outages", "flush_timeout_seconds": patience}
    (run / "config.yaml").write_text(json.dumps({"tracking": tracking, "run": {"dir": str(run), "pipeline": None}}))
    return TrackingConfig(**tracking)


def synced(run: Path) -> Ended:
    return ended(["foveal", "track", "sync", run], run.parent)


def synced_here(run: Path, *more: str) -> str:
    """The same command in this process; what it prints."""
    return CliRunner().invoke(app, ["track", "sync", str(run), *more], catch_exceptions=False).stdout


def check_equal(server: Server, run: Path) -> None:
    """Every (step, name, value) of metrics.jsonl is in the store, once, and no other."""
    ours, theirs = comparable(in_jsonl(run)), comparable(in_mlflow(MlflowClient(server.uri), run))
    assert len(ours) > _STEPS * 3
    assert all(len(values) == 1 for values in ours.values())
    assert {place: values for place, values in theirs.items() if ours.get(place) != values} == {}
    assert ours.keys() == theirs.keys()


def check_end(server: Server, run: Path, state: AttemptState, status: str) -> None:
    """The state, and what else a run is to leave."""
    client = MlflowClient(server.uri)
    found = client.get_run(run_id(run))
    assert (found.data.tags["state"], found.info.status) == (state, status)
    assert found.data.params == {"optim.lr": "0.1", "epochs": "3"}
    assert {each.path for each in client.list_artifacts(run_id(run))} == {"config.yaml", "settings.json"}


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == level and each.name.startswith("foveal")]


def has(server: Server, run: Path, step: int) -> None:
    """Wait until the store has a step."""
    client, end = MlflowClient(server.uri), time.monotonic() + _LONG
    while time.monotonic() < end:
        if (run / "mlflow.json").exists() and client.get_run(run_id(run)).data.metrics.get(
            "update/lr", 0
        ) >= step / 1000:
            return
        time.sleep(0.1)
    pytest.fail(f"{run}: step {step} was not delivered within {_LONG} s")


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + _LONG
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_in_mid_run_and_started_again(healthy: Server, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, configured(run, healthy.uri), None, 0)
    at = {
        52: lambda: has(healthy, run, 50),
        120: healthy.kill,
        150: lambda: until(lambda: said(caplog, logging.WARNING)),
    }
    train(tracker, 1, _STEPS, at)
    healthy.start()
    tracker.close("finished")
    (warning,), (back,) = said(caplog, logging.WARNING), said(caplog, logging.INFO)
    assert warning.startswith(f"tracking: MLflow at {healthy.uri} does not answer (")
    assert back.startswith(f"tracking: MLflow at {healthy.uri} answers again; ")
    assert 180 <= int(back.split("; ")[1].split()[0]) <= 310
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")


@pytest.mark.thorough
def test_every_kind_of_trouble_at_random(healthy: Server, spoiler: Spoiler, tmp_path: Path, monkeypatch) -> None:
    """Requests that are refused, and requests whose answers are lost."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run, draw = tmp_path / "run", random.Random(3)
    for number in range(18):
        kind = ("500", "503", "cut", "stall", "cut", "hang")[number % 6]
        about = ("log-batch", "")[number % 4 == 3]
        spoiler.inject(kind, about=about, skip=draw.randrange(3), after=0)
    tracker, _ = open_tracker(run, configured(run, spoiler.uri), None, 0)
    train(tracker, 1, _STEPS)
    tracker.close("finished")
    assert not spoiler.faults_left()
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")
    experiment = MlflowClient(healthy.uri).get_experiment_by_name("outages")
    assert experiment is not None
    runs = MlflowClient(healthy.uri).search_runs([experiment.experiment_id], f"tags.`foveal.folder` = '{run}'")
    assert len(runs) == 1


def test_requests_that_arrive_after_they_were_said_again(
    healthy: Server, spoiler: Spoiler, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, configured(run, spoiler.uri), None, 0)
    spoiler.inject("late", about="log-batch", skip=3, times=3)  # settings, tags and some rows go well
    train(tracker, 1, _STEPS)
    tracker.close("finished")
    assert not spoiler.faults_left()
    check_equal(healthy, run)
    spoiler.release()
    until(lambda: not [each for each in threading.enumerate() if each.name == "proxy-client"])
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")


@pytest.mark.thorough
def test_hanging_from_the_start_and_synced_by_hand(
    healthy: Server, spoiler: Spoiler, tmp_path: Path, caplog, monkeypatch
) -> None:
    """It accepts and never answers: the loop has done its steps before one request has failed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    spoiler.inject("hang", times=10**6)
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, configured(run, spoiler.uri, patience=1.0), None, 0)
    train(tracker, 1, _STEPS)
    assert not said(caplog, logging.WARNING)
    tracker.close("saved-and-left", "Slurm asked")
    (warning,) = said(caplog, logging.WARNING)
    assert warning.startswith(
        f"tracking: {_STEPS + 6} rows of {run}, or its files, are not delivered; foveal track sync {run} "
    )
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    done = synced(run)
    assert done.code == 2
    assert "foveal: " in done.err and "does not take it" in done.err
    wait_for_uploaders()
    spoiler.heal()
    done = synced(run)
    assert (done.code, done.err) == (0, "")
    assert f"{_STEPS + 6} rows and" in done.out
    check_equal(healthy, run)
    check_end(healthy, run, "saved-and-left", "SCHEDULED")
    assert MlflowClient(healthy.uri).get_run(run_id(run)).data.tags["why_stopped"] == "Slurm asked"


def wait_for_uploaders() -> None:
    """Wait until no thread of a tracker that was closed sends anything: after a run, its process has ended."""
    for thread in threading.enumerate():
        if thread.name == "uploader":
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.thorough
def test_a_wrong_address_from_the_start_and_synced_to_the_right_one(healthy: Server, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, configured(run, "http://127.0.0.1:9", patience=2.0), None, 0)
    train(tracker, 1, _STEPS, {150: lambda: until(lambda: said(caplog, logging.WARNING))})
    tracker.close("finished")
    first, last = said(caplog, logging.WARNING)
    assert first.startswith("tracking: MLflow at http://127.0.0.1:9 does not answer (")
    assert last.startswith(f"tracking: {_STEPS + 6} rows of {run}")
    assert not (run / "mlflow.json").exists()
    synced_here(run, "--uri", healthy.uri)
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")
    again = synced_here(run, "--uri", healthy.uri)
    assert f"0 rows and 2 files delivered, {_STEPS + 6} rows were there" in again
    check_equal(healthy, run)


@pytest.mark.thorough
def test_a_server_that_says_no(healthy: Server, spoiler: Spoiler, tmp_path: Path, caplog) -> None:
    """Each no is said as what it is, at once and once; when the experiment is back, so is its run, and gets the rest."""
    run, client = tmp_path / "run", MlflowClient(healthy.uri)
    cfg = configured(run, healthy.uri).model_copy(update={"experiment": "in the trash"})
    tracker, _ = open_tracker(run, cfg, None, 0)

    def delete() -> None:
        client.delete_experiment(client.get_run(run_id(run)).info.experiment_id)

    refused = "experiment in the trash is deleted: restore it or name another (tracking.experiment)"
    at = {52: lambda: has(healthy, run, 50), 60: delete, 150: lambda: until(lambda: refused in caplog.text)}
    train(tracker, 1, _STEPS, at)
    client.restore_experiment(client.get_run(run_id(run)).info.experiment_id)
    tracker.close("finished")
    (warning,) = said(caplog, logging.WARNING)
    assert warning.startswith(f"tracking: MLflow at {healthy.uri} refuses: {refused} (")
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")
    for status, uri in {401: spoiler.uri, 403: spoiler.uri, 404: f"{healthy.uri}/wrong/path"}.items():
        spoiler.inject(str(status))
        with pytest.raises(MlflowException) as caught:
            MLflowRun(TrackingConfig(uri=uri), tmp_path / str(status), None, "x")
        assert f"error code {status}" in (explain_refusal(caught.value) or ""), caught.value


@pytest.mark.thorough
def test_killed_for_good_and_synced_by_hand(healthy: Server, tmp_path: Path, caplog) -> None:
    run = tmp_path / "run"
    tracker, _ = open_tracker(run, configured(run, healthy.uri, patience=2.0), None, 0)
    noticed = {150: lambda: until(lambda: said(caplog, logging.WARNING))}
    train(tracker, 1, _STEPS, {52: lambda: has(healthy, run, 50), 120: healthy.kill, **noticed})
    tracker.close("finished")
    assert len(said(caplog, logging.WARNING)) == 2
    with pytest.raises(FovealError, match="was not delivered"):
        synced_here(run)
    healthy.start()
    healthy.answers()
    assert int(synced_here(run).split()[1]) in range(180, 260)
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")


_ATTEMPT = """
import sys
from pathlib import Path
from foveal.tracking import open_tracker, uploader
from foveal.tracking.tracker import TrackingConfig
from test_mlflow import train
run, uri, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
uploader._ROUND_SECONDS = 0.02
tracker, _ = open_tracker(run, TrackingConfig(uri=uri, experiment="outages"), None, start)
train(tracker, start + 1, 1000, pause=0.05)
"""


@pytest.mark.thorough
def test_attempts_that_are_killed_at_any_moment(healthy: Server, tmp_path: Path) -> None:
    """Each goes on from a checkpoint behind what was delivered; the last one ends well."""
    run, draw = tmp_path / "run", random.Random(5)
    cfg = configured(run, healthy.uri)
    for start in (0, 40, 90, 130, 170):
        path = f"{ROOT}:{ROOT}/tests/support:{ROOT}/tests/remote"
        attempt = Started(
            [PYTHON, "-W", "ignore", "-c", _ATTEMPT, run, healthy.uri, str(start)], tmp_path, PYTHONPATH=path
        )
        has(healthy, run, start + 60)
        time.sleep(draw.uniform(0.0, 0.3))
        attempt.process.kill()
        attempt.process.communicate()
    tracker, last = open_tracker(run, cfg, None, 190)
    assert last["step"] == 190
    train(tracker, 191, _STEPS)
    tracker.close("finished")
    check_equal(healthy, run)
    check_end(healthy, run, "finished", "FINISHED")


@pytest.mark.thorough
def test_back_behind_what_was_delivered(healthy: Server, tmp_path: Path) -> None:
    """Rows that were delivered before the run went back are void and come again; an attempt later nothing does."""
    run = tmp_path / "run"
    cfg = configured(run, healthy.uri)
    tracker, _ = open_tracker(run, cfg, None, 0)
    train(tracker, 1, 150)
    has(healthy, run, 150)
    client, end = MlflowClient(healthy.uri), time.monotonic() + _LONG
    while ("val/top1", 150) not in in_mlflow(client, run):  # the last row, which may come in a request of its own
        assert time.monotonic() < end
        time.sleep(0.1)
    with (run / "rollbacks.jsonl").open("a") as stream:
        stream.write(json.dumps({"time": time.time(), "to": 100}) + "\n")
    tracker.rewind(100)
    tracker.log_rows(rows_of(101, 130, salt=0.5))
    tracker.close("failed")
    tracker, last = open_tracker(run, cfg, None, 120)
    assert last["loss"] == 1 / 120 + 0.5
    tracker.log_rows(rows_of(121, _STEPS, salt=0.5))
    tracker.close("finished")
    ours, theirs = in_jsonl(run), in_mlflow(MlflowClient(healthy.uri), run)
    assert comparable({place: values[-1:] for place, values in theirs.items() if place in ours}) == comparable(ours)
    twice = {place for place, values in theirs.items() if len(values) == 2}
    assert {step for name, step in twice if name == "train/loss"} == set(range(101, 151))
    assert {place for place in theirs if place not in ours} == {("val/top1", 150)}
