"""An SQLite store of MLflow's is there whole, however many runs begin at once and whatever kills them."""

import contextlib
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PYTHON, ROOT

from foveal.tracking import sqlite_store
from foveal.tracking.sqlite_store import lock_store, parse_sqlite_path, prepare_store_and_artifacts
from foveal.tracking.store_errors import StoreRefusedError

_BEGIN = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from foveal.tracking import mlflow, sqlite_store
from foveal.tracking.tracker import TrackingConfig
if sys.argv[3] == "unlocked":
    sqlite_store._acquire_lock = lambda lock, file: None
def die_in_the_middle(connection, *_):
    if os.path.getsize(connection.engine.url.database) > 50_000:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "killed":
    event.listen(Engine, "after_cursor_execute", die_in_the_middle)
sys.stdin.readline()
mlflow.MLflowRun(TrackingConfig(uri=sys.argv[1]), Path(sys.argv[2]), None, sys.argv[2])
"""


def begin(store: Path, run: Path, kind: str) -> subprocess.Popen[bytes]:
    """A process that makes the store, or finds it made, once a line is sent to it."""
    command = [PYTHON, "-W", "ignore", "-c", _BEGIN, f"sqlite:///{store}", run, kind]
    own = {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.Popen(command, env=os.environ | own, stdin=subprocess.PIPE)


def tables(store: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        return {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}


def runs(store: Path) -> int:
    with contextlib.closing(sqlite3.connect(store)) as connection:
        return connection.execute("select count(*) from runs").fetchone()[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_begin_at_once_and_one_that_is_killed(tmp_path: Path) -> None:
    """Some without the lock, as on a file system that has none. The killed one is in the middle of making the store."""
    store = tmp_path / "deep" / "mlflow.db"
    kinds = {"killed": "killed", "a": "locked", "b": "locked", "c": "unlocked", "d": "unlocked"}
    killed, *several = (begin(store, tmp_path / name, kind) for name, kind in kinds.items())
    go(killed)
    assert killed.wait(120) == -signal.SIGKILL
    assert not store.exists()
    assert [each.stat().st_size > 50_000 for each in drafts(store)] == [True]
    for each in several:
        go(each)
    assert [each.wait(240) for each in several] == [0] * 4
    assert not [name for name in tables(store) if name.startswith("_alembic_tmp")]
    assert runs(store) == 4
    assert len(drafts(store)) == 1, "of the one that was killed"


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.close()


def drafts(store: Path) -> list[Path]:
    return list(store.parent.glob(".*.draft")) if store.parent.exists() else []


def test_the_name_is_the_first_ones(tmp_path: Path) -> None:
    """Whoever is second uses the store of the first, and leaves nothing."""
    file = tmp_path / "mlflow.db"

    def make(draft: Path) -> None:
        draft.write_bytes(b"second")
        file.write_bytes(b"SQLite format 3\x00first")

    with lock_store(file, make):
        assert file.read_bytes().endswith(b"first")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)


@pytest.mark.usefixtures("no_links")
def test_a_file_system_without_links(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with lock_store(file, lambda draft: draft.write_bytes(b"whole")):
        assert file.read_bytes() == b"whole"


def test_a_lock_that_is_left_or_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mlflow.db"
    (tmp_path / ".mlflow.db.lock").write_text("left behind")
    monkeypatch.setattr(sqlite_store, "_LOCK_TIMEOUT", 0.1)

    def nested(draft: Path) -> None:
        draft.write_bytes(b"")
        with pytest.raises(TimeoutError, match="is held by another run"), lock_store(file, nested):
            pass

    with lock_store(file, nested):
        pass


def a_folder(place: Path) -> Path:
    (place / "mlflow.db").mkdir()
    return place / "mlflow.db"


def a_text(place: Path) -> Path:
    (place / "mlflow.db").write_text("settings: 1")
    return place / "mlflow.db"


@pytest.mark.parametrize(("there", "said"), [(a_folder, "cannot be written"), (a_text, "is no SQLite database")])
def test_something_else_has_the_name(tmp_path: Path, there: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(StoreRefusedError, match=said), lock_store(there(tmp_path), lambda _: None):
        pass


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri in (f"sqlite:///{tmp_path}/file/mlflow.db", "sqlite:////proc/nowhere/mlflow.db"):
        with pytest.raises(StoreRefusedError, match=r"mlflow.db cannot be made \(.*\): set tracking.uri to a place"):
            prepare_store_and_artifacts(uri)
    for uri in ("sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(StoreRefusedError, match="names no file"):
            prepare_store_and_artifacts(uri)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    beside = f"file://{tmp_path}/a/mlartifacts"
    for uri, absolute in {
        "sqlite:///a/m.db?timeout=60": f"sqlite:///{tmp_path}/a/m.db?timeout=60",
        f"sqlite:///{tmp_path}/a/m.db": f"sqlite:///{tmp_path}/a/m.db",
        "sqlite+pysqlite:///a/m.db": f"sqlite+pysqlite:///{tmp_path}/a/m.db",
        "sqlite:///file:a/m.db?uri=true": f"sqlite:///file:{tmp_path}/a/m.db?uri=true",
        f"sqlite:///file://{tmp_path}/a/m.db?uri=true": f"sqlite:///file://{tmp_path}/a/m.db?uri=true",
    }.items():
        assert prepare_store_and_artifacts(uri) == (absolute, beside)
        assert parse_sqlite_path(absolute) == tmp_path / "a" / "m.db"
    assert parse_sqlite_path("postgresql://host/a.db") is None
