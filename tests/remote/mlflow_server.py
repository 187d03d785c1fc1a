"""A real ``mlflow server`` of this machine that a test kills and starts again, and a proxy that spoils its answers."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from ports import free_port
from processes import PYTHON
from proxy import Proxy

_STARTS = 150.0  # seconds that it may take on a busy machine
_HANGS = 60.0  # seconds, as against the patience of a client
_CHUNK = 1 << 16


class Server:
    """MLflow's server with a store, SQLite if no other, in a folder. It keeps its port and its store when it is started again.

    ``options`` are more of its command line, ``environment`` more of its variables, ``prefix`` its path in the URL.
    """

    def __init__(
        self,
        folder: Path,
        *,
        backend: str | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        prefix: str = "",
    ) -> None:
        self._folder = folder
        self._backend, self._options = backend or f"sqlite:///{folder}/mlflow.db", [*options]
        self._environment, self._prefix = environment or {}, prefix
        if prefix:
            self._options += ["--static-prefix", prefix]
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}{self._prefix}"

    @property
    def is_down(self) -> bool:
        """Whether it was killed and not started again."""
        return self._process is None

    def start(self) -> None:
        """Begin to start it; ``answers`` waits."""
        command = [PYTHON, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._backend]
        command += ["--serve-artifacts", "--artifacts-destination", str(self._folder / "artifacts"), *self._options]
        own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=os.environ | own | dict(self._environment),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def answers(self) -> None:
        """Wait until it does."""
        end = time.monotonic() + _STARTS
        while time.monotonic() < end:
            assert self._process is not None and self._process.poll() is None, (self._folder / "log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):  # noqa: S310
                return
            time.sleep(0.1)
        raise AssertionError((self._folder / "log").read_text())

    def kill(self) -> None:
        """SIGKILL to it and its workers, in the middle of whatever they do."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Spoiler(Proxy):
    """The proxy, for requests with bodies, and with two more faults.

    "hang" passes nothing on and never answers. "late" passes the request on only when ``release`` is called: by then the
    client has given up, and has said the same again.
    """

    def __init__(self, port: int) -> None:
        self._release = threading.Event()
        super().__init__(port)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def release(self) -> None:
        """Let late requests arrive."""
        self._release.set()

    def close(self) -> None:
        self.release()
        super().close()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(_HANGS)
            request = _request(client)
            if not request:
                return
            fault = self._noted(request.split(b"\r\n", 1)[0].decode())
            if fault and fault.kind.isdigit():
                client.sendall(f"HTTP/1.1 {fault.kind} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            if fault and fault.kind == "hang":
                self._closed.wait(_HANGS)
                return
            if fault and fault.kind == "late":
                self._release.wait(_HANGS)
            with socket.create_connection(("127.0.0.1", self._to), timeout=_HANGS) as server:
                server.sendall(request)
                self._pass_on(server, client, fault)


def _request(client: socket.socket) -> bytes:
    """A whole request, made into one after which the server closes the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = client.recv(_CHUNK)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    length = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        more = client.recv(_CHUNK)
        if not more:
            return b""
        body += more
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body
