"""MLflow as platform teams run it: PostgreSQL, a path prefix behind a proxy, passwords, artifacts through the server.

Real trainings deliver to real servers. PostgreSQL's client and the parts of MLflow's login come with the extra ``test``;
FOVEAL_TEST_PACKAGES may name a folder that has them for the servers.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow_server import Server
from points import comparable, in_jsonl, in_mlflow, run_id, without_nodes
from postgres import PASSWORD as DATABASE_PASSWORD
from postgres import Postgres, find_postgres
from prefix_proxy import serve_prefix
from processes import PYTHON, Ended, ended

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PREFIX = "/team/mlflow"
USER, PASSWORD = "admin", "planted-login-password"
PLANTED = {"DATA_TOKEN": "planted-data-token", "OTHER_SECRET": "planted-other-secret"}
EXTRA = os.environ.get("FOVEAL_TEST_PACKAGES", "")


def server_environment(*modules: str) -> dict[str, str]:
    """Return what a server needs to import these modules, or skip."""
    for module in modules:
        in_extra = EXTRA and (Path(EXTRA) / module).exists()
        if importlib.util.find_spec(module) is None and not in_extra:
            pytest.skip(f"{module} is not installed: pip install 'foveal[test]'")
    return {"PYTHONPATH": EXTRA} if EXTRA else {}


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    environment = server_environment("psycopg2")
    folder = tmp_path_factory.mktemp("postgres")
    database = Postgres(programs, folder)
    server = Server(folder, backend=database.uri, environment=environment, prefix=PREFIX)
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(database.close)
        stack.callback(server.kill)
        server.answers()
        yield server


@pytest.fixture(scope="module")
def login_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("login")
    login = folder / "login.ini"
    login.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/login.db\nadmin_username = {USER}\n"
        f"admin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = server_environment("flask_wtf") | {
        "MLFLOW_AUTH_CONFIG_PATH": str(login),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "planted-server-key",
    }
    server = Server(folder, options=["--app-name", "basic-auth"], environment=environment)
    server.start()
    try:
        server.answers()
        yield server
    finally:
        server.kill()


def pretrain(config: Path, run: Path, uri: str, *more: str, **environment: str) -> Ended:
    """A training of some steps that ends with a picture, with planted secrets around it."""
    command = [PYTHON, "-m", "pretrain.run", config, "engine.kind=plain", "epochs=2", "log.every=4"]
    command += [f"tracking.uri={uri}", f"run.dir={run}", *more]
    return ended(command, run.parent, **(PLANTED | {"PYTHONWARNINGS": "ignore"} | environment))


def check_delivered(client: MlflowClient, run: Path) -> None:
    """Rows, params, state and pictures of a run are in the store."""
    assert comparable(without_nodes(in_mlflow(client, run))) == comparable(in_jsonl(run))
    found = client.get_run(run_id(run))
    assert (found.info.status, found.data.tags["state"]) == ("FINISHED", "finished")
    assert found.data.params["epochs"] == "2"
    pictures = client.list_artifacts(run_id(run), "pictures")
    assert {picture.path for picture in pictures} == {f"pictures/{file.name}" for file in (run / "pictures").iterdir()}
    local = Path(client.download_artifacts(run_id(run), pictures[0].path))
    assert local.read_bytes() == (run / pictures[0].path).read_bytes()


def check_no_secret(client: MlflowClient, run: Path, *secrets: str) -> None:
    """No planted secret is in a file of the run directory, nor in a param, tag or artifact of the store."""
    needles = [secret.encode() for secret in (*secrets, *PLANTED.values(), DATABASE_PASSWORD)]
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 10
    found = client.get_run(run_id(run))
    told = repr((found.data.params, found.data.tags, found.info.run_name)).encode()
    stored = Path(client.download_artifacts(run_id(run), ""))
    files += [file for file in stored.rglob("*") if file.is_file()]
    for needle in needles:
        assert needle not in told
        assert [file for file in files if needle in file.read_bytes()] == []


def said(done: Ended) -> list[str]:
    return [line for line in (done.out + done.err).splitlines() if "tracking:" in line]


def test_postgresql_behind_a_prefix(
    configs: dict[str, Path], postgres_server: Server, pages: int, tmp_path: Path
) -> None:
    """A run whose data URL holds a secret of the environment, delivered through the proxy, artifacts too."""
    run, seen = tmp_path / "run", []
    with serve_prefix(PREFIX, postgres_server.port, seen) as uri:
        data = [
            f"data.path=http://127.0.0.1:{pages}/digits?sig=${{DATA_TOKEN}}",
            f"data.cache.dir={tmp_path / 'cache'}",
        ]
        done = pretrain(configs["pretrain"], run, uri, *data)
        assert done.code == 0, done.err
        assert said(done) == []
        client = MlflowClient(uri)
        check_delivered(client, run)
        check_no_secret(client, run)
        again = ended(["foveal", "track", "sync", run], tmp_path)
        assert again.code == 0, again.err
        assert ": 0 rows and" in again.out
        check_delivered(client, run)
        run_of_wrong_prefix = tmp_path / "wrong"
        done = pretrain(configs["pretrain"], run_of_wrong_prefix, uri.removesuffix(PREFIX))
        assert done.code == 0, done.err
        refusal, rest = said(done)
        assert "refuses: " in refusal
        assert "404" in refusal
        assert f"foveal track sync {run_of_wrong_prefix} delivers them" in rest
    assert any("mlflow-artifacts" in path for path in seen), "artifacts pass through the server"


def test_trials_are_children_in_postgresql(configs: dict[str, Path], postgres_server: Server, tmp_path: Path) -> None:
    run = tmp_path / "compared"
    command = [PYTHON, "-m", "finetune.run", configs["finetune"], "engine.kind=plain", "init=null", f"run.dir={run}"]
    command += ["trials.arms.scratch=null", "trials.repeats=2", "trials.lr_per_256=[0.01, 0.03]"]
    command += ["model.name=vit_tiny_patch16_224", "model.patch=4", "model.width=32", "model.depth=1", "model.heads=2"]
    command += [f"tracking.uri={postgres_server.uri}", "data.holdout_per_class=4", "optim.layer_decay=1.0"]
    done = ended(command, tmp_path)
    assert done.code == 0, done.err
    client = MlflowClient(postgres_server.uri)
    outer = client.get_run(run_id(run))
    assert (outer.info.status, outer.data.tags["state"]) == ("FINISHED", "finished")
    children = client.search_runs(
        [outer.info.experiment_id], f"tags.`mlflow.parentRunId` = '{outer.info.run_id}'", max_results=100
    )
    assert sorted(child.info.run_name or "" for child in children) == sorted(
        folder.name for folder in (run / "trials").iterdir()
    )
    for child in children:
        folder = run / "trials" / str(child.info.run_name)
        assert child.info.status == "FINISHED"
        assert child.data.params["seed"] in ("3", "4")
        assert child.info.run_id == run_id(folder)
        assert comparable(without_nodes(in_mlflow(client, folder))) == comparable(in_jsonl(folder))


@pytest.fixture
def admin(login_server: Server, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return MlflowClient(login_server.uri)


def test_a_login_by_variables_and_in_the_uri(
    configs: dict[str, Path], login_server: Server, tmp_path: Path, admin: MlflowClient, monkeypatch
) -> None:
    by_variables = tmp_path / "by-variables"
    done = pretrain(configs["pretrain"], by_variables, login_server.uri)
    assert (done.code, said(done)) == (0, []), done.err
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    in_uri = tmp_path / "in-uri"
    uri = "http://${LOGIN}@127.0.0.1:" + str(login_server.port)
    done = pretrain(configs["pretrain"], in_uri, uri, LOGIN=f"{USER}:{PASSWORD}")
    assert (done.code, said(done)) == (0, []), done.err
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    for run in (by_variables, in_uri):
        check_delivered(admin, run)
        check_no_secret(admin, run, PASSWORD)
    literal = ended(
        [PYTHON, "-m", "pretrain.run", configs["pretrain"], f"tracking.uri=http://{USER}:{PASSWORD}@127.0.0.1:1"],
        tmp_path,
    )
    assert literal.code == 2
    assert PASSWORD not in literal.out + literal.err


def test_a_wrong_password_is_one_line_and_the_run_ends_well(
    configs: dict[str, Path], login_server: Server, tmp_path: Path, admin: MlflowClient
) -> None:
    run = tmp_path / "run"
    wrong = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": "planted-wrong-password"}
    done = pretrain(configs["pretrain"], run, login_server.uri, **wrong)
    assert done.code == 0, done.err
    refusal, rest = said(done)
    assert f"tracking: MLflow at {login_server.uri} refuses: " in refusal
    assert "401" in refusal
    assert f"foveal track sync {run} delivers them" in rest
    assert "planted-wrong-password" not in done.out + done.err
    assert not (run / "mlflow.json").exists()
    synced = ended(["foveal", "track", "sync", run], tmp_path)
    assert synced.code == 0, synced.err
    check_delivered(admin, run)
    check_no_secret(admin, run, PASSWORD, "planted-wrong-password")
