"""MLflow's server beside the cluster's controller, and what it holds of a run in the end."""

import sqlite3
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from harness import Cluster
from machines import controller_address
from ports import free_port


@dataclass(frozen=True)
class Server:
    """MLflow with its store in ``folder``, at an address that the nodes reach."""

    folder: Path
    address: str
    port: int

    @property
    def uri(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def place(self) -> tuple[str, str]:
        return self.address, str(self.port)

    def start(self, cluster: Cluster) -> None:
        """Start it; it answers some seconds later, and keeps what it had."""
        store = [
            f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db",
            f"--artifacts-destination={self.folder}/files",
        ]
        host = [f"--host={self.address}", f"--port={self.port}", "--workers=1", "--allowed-hosts=*"]
        cluster.start("mlflow", sys.executable, "-m", "mlflow", "server", *store, *host)

    def delivered(self, run: Path, names: Sequence[str]) -> list[tuple[str, int, float]]:
        """Every (name, step, value) that the store holds of these metrics: twice what came twice.

        Those of MLflow's runs that say that they are of another directory are left out.
        """
        points = (
            "select key, step, value from metrics where is_nan = 0 and run_uuid not in "
            "(select run_uuid from tags where key = 'foveal.folder' and value != ?)"
        )
        with closing(sqlite3.connect(f"file:{self.folder}/mlflow.db?mode=ro", uri=True)) as store:
            found = store.execute(points, (str(run.resolve()),)).fetchall()
        return [each for each in found if each[0] in names]


def server(cluster: Cluster, folder: Path) -> Server:
    """A server that is not started yet."""
    folder.mkdir(parents=True)
    return Server(folder, controller_address(cluster.kind), free_port())
