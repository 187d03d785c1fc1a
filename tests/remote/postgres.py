"""A real PostgreSQL of this machine: a cluster in a folder, on loopback, with a password."""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ports import free_port

_USER, PASSWORD = "foveal", "planted-database-password"
_PATIENCE = 120.0  # seconds


def find_postgres() -> Path | None:
    """Return the folder of PostgreSQL's programs; Debian keeps them outside PATH. None: it is not installed."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *filter(None, [_folder_of(shutil.which("initdb"))])]
    return next((folder for folder in reversed(found) if (folder / "initdb").exists()), None)


def _folder_of(program: str | None) -> Path | None:
    return None if program is None else Path(program).resolve().parent


class Postgres:
    """A cluster with one database. PostgreSQL refuses to run as root, so it then runs as Debian's user postgres."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._data = programs, folder / "cluster"
        self.port = free_port()
        self._data.mkdir()
        self._user = "postgres" if os.getuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._data, self._user, self._user)
            for parent in self._data.parents:  # pytest's folders are for their owner alone
                if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                    parent.chmod(parent.stat().st_mode | 0o011)
        password_file = self._data.parent / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        self._call("initdb", "-D", self._data, "-U", _USER, "--auth=scram-sha-256", f"--pwfile={password_file}", "-N")
        options = [f"-p{self.port}", "-clisten_addresses=127.0.0.1", "-cunix_socket_directories=", "-cfsync=off"]
        with (folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._data, *options],
                user=self._user,
                cwd="/",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_ready(folder / "postgres.log")

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://{_USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(_PATIENCE)

    def _wait_until_ready(self, log: Path) -> None:
        end = time.monotonic() + _PATIENCE
        ready = [self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)

    def _call(self, program: str, *arguments: str | Path) -> None:
        command: Sequence[str | Path] = [self._programs / program, *arguments]
        done = subprocess.run(command, user=self._user, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
