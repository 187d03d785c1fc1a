"""A real training whose MLflow server is killed under it and comes back: the curve is the same, and MLflow has all of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from points import comparable, in_jsonl, in_mlflow, run_id, without_nodes
from processes import PYTHON, Started, ended, rows_of

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.answers()
    yield server
    server.kill()


def test_a_server_that_dies_and_comes_back(configs: dict[str, Path], server: Server, tmp_path: Path) -> None:
    shared = [PYTHON, "-m", "pretrain.run", configs["pretrain"], "engine.kind=plain", "epochs=6", "log.every=2"]
    quiet = ended([*shared, "tracking.uri=null", f"run.dir={tmp_path / 'quiet'}"], tmp_path)
    assert quiet.code == 0, quiet.err
    run = tmp_path / "run"
    told = [*shared, f"tracking.uri={server.uri}", "tracking.flush_timeout_seconds=120", f"run.dir={run}"]
    training = Started(told, tmp_path)
    training.reaches(run, 20)
    server.kill()
    training.reaches(run, 60)
    server.start()
    done = training.ended()
    assert done.code == 0, done.err
    assert comparable(without_nodes(in_mlflow(MlflowClient(server.uri), run))) == comparable(in_jsonl(run))
    found = MlflowClient(server.uri).get_run(run_id(run))
    assert (found.info.status, found.data.tags["state"]) == ("FINISHED", "finished")
    ours, theirs = rows_of(run), rows_of(tmp_path / "quiet")
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
