"""What a store gets beside rows: in which order, once, and what a store that does not take it gets."""

import logging
from pathlib import Path

import pytest
from fake_facts import KeptFacts, write_export, write_run_inputs
from points import row

from foveal.atomic import write_json
from foveal.runs.inputs import ModelInput
from foveal.tracking.exported import Export, list_exports, read_logged_exports
from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.sync_facts import FactsSync, find_source_model
from foveal.tracking.tracker import TrackingConfig


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with rows, inputs and an export."""
    folder = tmp_path / "pipeline" / "run"
    tracker = JsonlTracker(folder, 0)
    tracker.log_settings({"epochs": 3, "model.name": "vit_tiny"}, {"ranks": "1"})
    tracker.log_rows([row(step) for step in range(1, 5)])
    tracker.log_results_once({"val_top1": 0.5}, 4)
    tracker.close("finished")
    write_run_inputs(folder)
    write_export(folder, val_top1=0.5, loss=0.25, lr=0.04)
    write_json(folder / "finished.json", {"summary": {"val_top1": 0.5, "lr": 0.04}})
    return folder


def synced(run: Path, store: KeptFacts, **settings: object) -> FactsSync:
    sync = FactsSync(run, TrackingConfig.from_dict({"uri": "sqlite:///x.db", **settings}, "test"), "MLflow at here")
    sync.send_facts(store)
    sync.send_models(store)
    return sync


def test_each_fact_once_and_in_order(run: Path) -> None:
    store = KeptFacts()
    sync = synced(run, store)
    first = ["datasets", "input models", "description", "pipeline", "create", "complete"]
    assert store.calls == first
    assert [data.split for data in store.datasets] == ["train", "val"]
    assert store.pipeline == {"val_top1": 0.5}
    assert {(name, value, step) for name, value, _, step in store.points["m-1"]} == {
        ("val/top1", 0.5, 4),
        ("train/loss", 0.25, 4),
    }
    assert read_logged_exports(run, "1")["export"].is_complete
    sync.send_facts(store)
    sync.send_models(store)
    assert store.calls == first, "nothing has changed"
    sync.reset()
    sync.send_facts(store)
    sync.send_models(store)
    assert store.calls == first + first[:4], "a new connection asks for what may have got lost; the note has the model"
    assert synced(run, KeptFacts(run_id="2")) and set(read_logged_exports(run, "2")) == {"export"}


@pytest.mark.parametrize("verb", ["datasets", "input models", "description", "pipeline", "create", "complete"])
def test_a_failure_that_may_pass_is_raised_and_tried_again(run: Path, verb: str) -> None:
    store, left = KeptFacts(), [verb]

    def fail(now: str) -> None:
        if now in left:
            left.remove(now)
            raise ConnectionError("gone")

    store.before = fail
    with pytest.raises(ConnectionError):
        synced(run, store)
    synced(run, store)
    assert (len(store.datasets), len(store.models), store.stage) == (2, 1, "pretrain")
    assert read_logged_exports(run, "1")["export"].is_complete


@pytest.mark.parametrize(
    "verb", ["datasets", "input models", "description", "pipeline", "create", "weights", "register"]
)
def test_a_store_that_does_not_take_a_fact_gets_the_rest(
    run: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = KeptFacts()

    def refuse(now: str) -> None:
        if now == verb:
            raise NotImplementedError(verb)

    store.before = refuse
    with caplog.at_level(logging.WARNING, "foveal"):
        sync = synced(run, store, upload_models=True, register="digits")
        sync.reset()
        sync.send_facts(store)
        sync.send_models(store)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("tracking: MLflow at here takes no ") and line.endswith("(the rest goes on)")
    expected = {"datasets", "input models", "description", "pipeline", "create", "complete", "weights", "register"}
    missing = {"create": {"complete", "weights", "register"}}.get(verb, set())
    assert set(store.calls) == expected - missing
    assert store.calls.count(verb) == 1


def test_a_failure_that_never_passes_does_not_hold_up_the_rest(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = KeptFacts()
    store.before = lambda verb: (_ for _ in ()).throw(RuntimeError("500")) if verb == "datasets" else None
    sync = FactsSync(run, TrackingConfig(uri="sqlite:///x.db"), "MLflow at here")
    for _ in range(7):
        with pytest.raises(RuntimeError):
            sync.send_facts(store)
    with caplog.at_level(logging.WARNING, "foveal"):
        sync.send_facts(store)
    assert "takes no data sets of runs: RuntimeError, again and again" in caplog.text
    assert store.stage == "pretrain"


def test_an_export_that_is_replaced(run: Path) -> None:
    """By a later attempt: the store gets another model, and the first one says which."""
    store = KeptFacts()
    sync = synced(run, store)
    write_export(run, "b" * 64, 8)
    sync.send_models(store)
    assert store.replaced == {"m-1": "m-2"}
    assert read_logged_exports(run, "1")["export"].model_id == "m-2"
    sync.send_models(store)
    assert store.calls.count("complete") == 2


def test_registration_is_for_finished_runs(run: Path) -> None:
    store = KeptFacts()
    write_json(run / "tags.json", {"state": "saved-and-left"})
    write_export(run, name="export/small")
    sync = synced(run, store, register="digits", alias="champion", upload_models=True)
    assert store.versions == {}
    assert len(store.weights) == 2
    write_json(run / "tags.json", {"state": "finished", "why_stopped": "finished"})
    write_json(run / "finished.json", {"summary": {}})
    sync.send_models(store)
    assert {key.split()[0]: alias for key, (_, alias) in store.versions.items()} == {
        "digits": "champion",
        "digits-small": "champion",
    }
    assert len(store.weights) == 2, "uploaded once"


def test_registration_waits_for_the_state_of_the_attempt(run: Path) -> None:
    """finished.json is there before the attempt has closed its tags."""
    store = KeptFacts()
    write_json(run / "tags.json", {"state": "running"})
    sync = synced(run, store, register="digits")
    assert store.versions == {}
    write_json(run / "tags.json", {"state": "finished"})
    sync.send_models(store)
    assert len(store.versions) == 1


@pytest.mark.parametrize("card", [None, {"step": "x"}, {"step": None}, {"step": 1, "encoder": None}])
def test_an_export_that_the_store_does_not_take_stops_no_other(
    run: Path, card: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several students one is refused, or has no card that foveal wrote."""
    store = KeptFacts()
    write_export(run, "b" * 64, name="export/a")
    if card is None:
        left = [BadValueError(), None, None]
        store.before = lambda verb: _raise(left.pop(0)) if verb == "create" else None
    else:
        write_json(run / "export" / "a" / "card.json", card)
    write_export(run, "c" * 64, name="export/b")
    with caplog.at_level(logging.WARNING, "foveal"):
        synced(run, store)
    assert len(store.points) == 2
    assert ("takes no models (export" in caplog.text) == (card is None)


class BadValueError(Exception):
    """The answer to a bad value."""

    def get_http_status_code(self) -> int:
        return 400


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_the_chain_of_models(run: Path, tmp_path: Path) -> None:
    """A source is found by the path of its export, or by what recorded it; another store's, and a copy's, is not."""
    store = KeptFacts()
    synced(run, store)
    source = ModelInput("teacher", str(run / "export"), "a" * 64, "pretrain", 4)
    assert find_source_model(source, store) is None, "the note of its run is missing"
    write_json(run / "mlflow.json", {"run_id": "1", "store": "here"})
    assert find_source_model(source, store) == "m-1"
    fork = ModelInput("fork", str(run), "checkpoint", "pretrain", 4)
    assert find_source_model(fork, store) == "m-1"
    assert find_source_model(ModelInput("fork", str(run), "checkpoint", "pretrain", 3), store) is None
    recorded = write_run_inputs(run)
    moved = ModelInput("init", "/gone/export", "a" * 64, "pretrain", 4, recorded)
    assert find_source_model(moved, store) == "m-1"
    assert find_source_model(ModelInput("init", str(run / "export"), "c" * 64, "pretrain", 4), store) is None
    assert find_source_model(source, KeptFacts(store="there")) is None
    consumer, both = tmp_path / "consumer", (source, ModelInput("init", "/gone/x", "c" * 64, "foreign", 0))
    write_run_inputs(consumer, *both, stage="distill")
    synced(consumer, store)
    assert (store.linked, store.unlinked) == ({"teacher": "m-1"}, ["init"])


def test_damaged_files_cost_their_facts_only(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "inputs.json").write_text('{"run": 1}')
    (run / "export" / "card.json").write_text('{"stage": ')
    (run / "mlflow_models.json").write_text("half")
    store = KeptFacts()
    with caplog.at_level(logging.WARNING, "foveal"):
        synced(run, store)
    assert store.calls == ["description", "pipeline"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "inputs.json: its inputs are not as foveal wrote them" in line and line.endswith("here gets the rest")


def test_the_model_card_without_its_front_matter(run: Path) -> None:
    (export,) = list_exports(run)
    assert export.read_description() == "# An encoder"
    (export.folder / "README.md").write_text("# No front matter\n---\n")
    assert export.read_description() == "# No front matter\n---"
    (export.folder / "README.md").unlink()
    assert export.read_description() == ""
    assert Export("export", run, {}).identity == "0"
