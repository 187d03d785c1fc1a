"""A TCP proxy between a client and a server that does to the answers what networks do."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass

_CHUNK = 1 << 16
_LONG = 60.0  # seconds: a stall, as against the patience of a test


@dataclass
class Fault:
    """What happens to requests whose first line holds ``about``, as often as ``times``, after ``skip`` that go well.

    kind: "503" or "401" answers without asking the server; "cut" closes after ``after`` bytes of the answer; "stall" stops sending
    after them; "wrong" flips a bit in every chunk that comes after them; "slow" sends at ``rate`` bytes a second.
    """

    kind: str
    about: str = ""
    times: int = 1
    skip: int = 0
    after: int = 2000
    rate: float = 1e6


class Proxy:
    """Listens on a port of loopback and passes connections on to another. One request per connection."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.requests: list[str] = []  # first lines
        self.sent = 0  # bytes of answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="proxy")
        self._thread.start()

    def inject(self, kind: str, **settings: object) -> Fault:
        """Add a fault; the first that fits a request befalls it."""
        fault = Fault(kind, **settings)  # pyright: ignore[reportArgumentType] - a test's own words
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No more faults; what was noted is forgotten."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.sent = 0

    def faults_left(self) -> int:
        """Faults that have not happened yet."""
        with self._lock:
            return sum(fault.times for fault in self._faults)

    def gets(self, name: str) -> int:
        """How often the bytes of a file were asked for."""
        with self._lock:
            return sum(line.startswith("GET") and name in line for line in self.requests)

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        self._thread.join()

    def _listen(self) -> None:
        self._listener.settimeout(0.1)
        while not self._closed.is_set():
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), name="proxy-client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(_LONG)
            head = _head(client)
            if not head:
                return
            line = head.split(b"\r\n", 1)[0].decode()
            fault = self._noted(line)
            if fault and fault.kind.isdigit():
                client.sendall(f"HTTP/1.1 {fault.kind} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            with socket.create_connection(("127.0.0.1", self._to), timeout=_LONG) as server:
                server.sendall(_closing(head))
                self._pass_on(server, client, fault)

    def _noted(self, line: str) -> Fault | None:
        with self._lock:
            self.requests.append(line)
            for fault in self._faults:
                if fault.times and fault.about in line:
                    if not fault.skip:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
        return None

    def _pass_on(self, server: socket.socket, client: socket.socket, fault: Fault | None) -> None:
        """Send an answer on, with its fault; the headers are never touched."""
        headers, _, chunk = _head(server).partition(b"\r\n\r\n")
        client.sendall(headers + b"\r\n\r\n")
        answer = 0
        while chunk := chunk or server.recv(_CHUNK):
            if fault and answer + len(chunk) > fault.after:
                chunk = _befallen(chunk, max(0, fault.after - answer), fault)
            client.sendall(chunk)
            answer += len(chunk)
            with self._lock:
                self.sent += len(chunk)
            if fault and answer >= fault.after:
                if fault.kind == "cut":
                    return
                if fault.kind == "stall":
                    self._closed.wait(_LONG)
                    return
                if fault.kind == "slow":
                    time.sleep(len(chunk) / fault.rate)
            chunk = b""


def _befallen(chunk: bytes, after: int, fault: Fault) -> bytes:
    if fault.kind in ("cut", "stall"):
        return chunk[:after]
    if fault.kind == "wrong":
        return chunk[:after] + bytes([chunk[after] ^ 1]) + chunk[after + 1 :]
    return chunk


def _head(stream: socket.socket) -> bytes:
    """A request or an answer up to the end of its headers, and what came with them."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = stream.recv(_CHUNK)
        if not more:
            break
        data += more
    return data


def _closing(head: bytes) -> bytes:
    """The same request, after which the server closes the connection: one request, one answer."""
    lines, _, body = head.partition(b"\r\n\r\n")
    kept = [line for line in lines.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + body
