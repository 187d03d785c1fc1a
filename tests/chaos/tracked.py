"""What can happen to where a run is tracked: the server is away, a store is made by many at once, a copy has one note."""

import json
import shutil
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from faults import Fault, OnSlurm
from scene import Scene, Stuck

_ALWAYS_500 = """
import http.server, sys
class Failing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(500)
    do_POST = do_PATCH = do_PUT = do_DELETE = do_GET
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Failing).serve_forever()
"""
_ASK = """
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
"""
_SYNC_AT_ONCE = """
import os, sys
import foveal.tracking.mlflow, mlflow.store.tracking.sqlalchemy_store
from foveal.cli import app
for run in sys.argv[2:]:
    if not os.fork():
        app(["track", "sync", run, "--uri", sys.argv[1]])
sys.exit(max(os.waitstatus_to_exitcode(os.wait()[1]) for run in sys.argv[2:]))
"""
_FURTHER = 15  # steps that a copy makes


class Unserved(Fault):
    """The tracking server is away: seen from where the job is. Training goes on, and what it missed is delivered later."""

    resumes = False
    lasts = 8.0

    def __init__(self, scene: Scene, how: str) -> None:
        super().__init__(scene)
        self.how = how
        self.name = f"tracking server {how}"

    def impossible(self) -> str | None:
        return None if self.scene.server else "no tracking server"

    def strike(self) -> None:
        assert self.scene.server is not None
        self.target = "MLflow's server"
        if self.how == "hangs":
            self.scene.cluster.send("mlflow", signal.SIGSTOP)
        else:
            self.scene.cluster.send("mlflow", signal.SIGKILL)
        if self.how == "fails":
            self.scene.cluster.start("failing", sys.executable, "-c", _ALWAYS_500, *self.scene.server.place)

    def seen(self) -> bool:
        assert self.scene.server is not None
        asked = self.scene.cluster.run(sys.executable, "-c", _ASK, self.scene.server.uri, check=False, timeout=30)
        return asked.returncode != 0

    def mend(self) -> None:
        assert self.scene.server is not None
        if self.how == "hangs":
            self.scene.cluster.send("mlflow", signal.SIGCONT)
            return
        if self.how == "fails":
            self.scene.cluster.end("failing", signal.SIGKILL)
        self.scene.server.start(self.scene.cluster)


class MadeAtOnce(Fault):
    """Three runs are delivered to an SQLite store that none of them has made yet. All of them are in it afterwards."""

    name = "SQLite store made by three at once"
    resumes = False

    def strike(self) -> None:
        scene, folder = self.scene, self.scene.folder / f"at-once-{time.monotonic_ns()}"
        scene.until(lambda: scene.last_step() > 0, "there is a row", 120)
        copies = [folder / str(number) for number in range(3)]
        for copy in copies:
            shutil.copytree(scene.run, copy, ignore=shutil.ignore_patterns("checkpoints", "attempts", "mlflow.json"))
        store = folder / "mlflow.db"
        with scene.held():
            command = [sys.executable, "-c", _SYNC_AT_ONCE, f"sqlite:///{store}", *map(str, copies)]
            done = scene.cluster.run(*command, check=False, cwd=scene.folder, timeout=300)
        with closing(sqlite3.connect(store)) as opened:
            (runs,) = opened.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone()
        if done.returncode or runs != len(copies):
            raise Stuck(f"{self.name}: exit code {done.returncode}, {runs} runs\n{done.stdout}{done.stderr[-3000:]}")
        self.target = f"{runs} runs"

    def seen(self) -> bool:
        return True


class Copied(OnSlurm):
    """The user copies the run's directory, and goes on with both: MLflow has each in a run of its own."""

    name = "a copy of the run goes on beside it"
    patience = 150.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.copy = scene.folder / f"runs/copy-{time.monotonic_ns()}"

    def impossible(self) -> str | None:
        return None if self.scene.server else "no tracking server"

    def act(self) -> None:
        scene = self.scene
        scene.cancel()
        shutil.copytree(scene.run, self.copy)
        step = scene.last_step()
        scene.submit()
        self.before = -1  # a new job has not been requeued
        self.target = f"{self.copy.name}, from step {step}"
        stage = [sys.executable, "-m", "pretrain.run", *scene.line(self.copy)]
        with scene.held():
            scene.cluster.start(self.copy.name, "env", f"--chdir={scene.folder}", *stage)
            scene.until(lambda: _last_step(self.copy) >= step + _FURTHER, "the copy goes on", 150)
            self.mend()

    def seen(self) -> bool:
        mine, copied = (json.loads((run / "mlflow.json").read_text())["run_id"] for run in (self.scene.run, self.copy))
        if mine == copied:
            raise Stuck(f"{self.name}: both are MLflow's run {mine}")
        return True

    def mend(self) -> None:
        self.scene.cluster.end(self.copy.name, signal.SIGTERM)


def _last_step(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    return max((json.loads(line).get("step", 0) for line in lines), default=0)
