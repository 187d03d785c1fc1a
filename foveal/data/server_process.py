"""The server of worker processes as the trainer holds it: its start, what it says of a worker's end, its own end."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from foveal.data.worker_process import SharedDescriptors
from foveal.data.worker_server import MESSAGE_BYTES
from foveal.errors import LaunchError

_END_SECONDS = 5.0  # for the server to kill its workers and end
# Signals that a scheduler or a terminal sends to all processes of a run. The trainer saves and leaves, and needs batches
# until then; the workers end with it.
_BLOCKED_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE}
_BLOCKED_SIGNALS -= {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}
# One thread: what runs beside a fork is lost in the child. No GPU: memory on it is the trainer's.
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class ServerProcess:
    """``worker_server`` as a process that finds the modules which this one finds.

    It inherits descriptors as a child does: messages with descriptors would wait in a queue, of ten messages by default,
    until the server has imported torch. sockets: one for each worker. modules: to import before the forks.
    Raises: LaunchError if this user may start no further process.
    """

    def __init__(self, sockets: Sequence[int], shared: SharedDescriptors, modules: Sequence[str]) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import os, sys; os.environ.update({_ENVIRONMENT!r}); sys.path[:] = {sys.path!r}; "
            f"from foveal.data.worker_server import serve; "
            f"serve({other.fileno()}, {list(sockets)!r}, {tuple(shared)!r}, {list(modules)!r})"
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)  # inherited, from its first moment
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno(), *sockets, *shared],
            )
        except BlockingIOError as error:
            raise LaunchError(
                f"no process for the loader can be started ({error.strerror}): raise the limit of this user's processes "
                f"(`ulimit -u`), or set data.workers=0"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            other.close()

    def describe_end(self, worker: int) -> str:
        """Return how a worker has ended, or why there never was one."""
        answer = self._ask(worker)
        if answer.lstrip("-").isdigit():
            return describe_exit(int(answer))
        if answer:
            return f"did not start ({answer})"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"ended with the server that had started it, which {describe_exit(self._process.wait(_END_SECONDS))}"
        return "ended"

    def close(self) -> None:
        """End the server, which kills its workers, whatever they do."""
        self._socket.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # it waits for a worker in a read that cannot be killed
            self._process.kill()
            self._process.wait()

    def _ask(self, worker: int) -> str:
        """Return the worker's exit code, or the error that ended the server before its work; empty: it says nothing."""
        with contextlib.suppress(OSError):
            try:
                answer = self._socket.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)  # its last words
            except BlockingIOError:
                self._socket.settimeout(_END_SECONDS)
                self._socket.send(str(worker).encode())
                answer = self._socket.recv(MESSAGE_BYTES)
            return answer.decode(errors="replace")
        return ""


def describe_exit(code: int) -> str:
    """Return what an exit code says; negative: the signal that killed the process."""
    if code >= 0:
        return f"ended with code {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"
