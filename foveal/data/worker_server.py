"""The server that forks worker processes: a process of its own, which the trainer starts and which ends with it.

A fork costs milliseconds and shares the memory of what is imported; a new interpreter imports torch for a second. The
trainer itself is no process to fork: its threads and CUDA context do not survive in a child, and a child would hold the
trainer's ends of all pipes and outlive it. Python's own fork server is one for a process and its imports are chosen
once, by whoever comes first; this one is started per pool and needs no resource tracker.

Three nets hold the processes: the trainer's end closes the socket, on which the server waits with nothing else to do,
and the server kills its workers; a worker whose server is gone is killed by the kernel; a worker reads the end of its
own pipe.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

from foveal.data.worker_process import SharedDescriptors, run_worker
from foveal.redact import redact, redact_tracebacks

MESSAGE_BYTES = 512
_PR_SET_PDEATHSIG = 1


def serve(descriptor: int, sockets: Sequence[int], shared: tuple[int, int, int], modules: Sequence[str]) -> None:
    """Fork a worker for every socket; answer the number of one that has ended by its exit status.

    ``shared``: ``SharedDescriptors``. ``modules``: imported before the first fork.
    """
    redact_tracebacks()
    server = socket.socket(fileno=descriptor)
    try:
        for module in modules:
            importlib.import_module(module)
        processes = _fork_workers(server, sockets, SharedDescriptors(*shared))
    except Exception as error:
        server.send(redact(f"{type(error).__name__}: {error}").encode()[:MESSAGE_BYTES])
        raise
    while message := server.recv(MESSAGE_BYTES):
        server.send(str(_wait_for_exit(processes.pop(int(message)))).encode())
    for process_id in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    for process_id in processes.values():
        _wait_for_exit(process_id)


def _fork_workers(server: socket.socket, sockets: Sequence[int], shared: SharedDescriptors) -> dict[int, int]:
    """Return the process id of the worker for each socket."""
    libc = ctypes.CDLL(None)  # loaded before the forks
    gc.collect()
    gc.freeze()  # a collection in a worker writes to no page that it shares
    processes: dict[int, int] = {}
    for worker, messages in enumerate(sockets):
        process_id = os.fork()
        if not process_id:
            server.close()
            for other in sockets[worker + 1 :]:  # whoever holds it keeps the trainer from reading that worker's end
                os.close(other)
            _become_worker(libc, worker, messages, shared)
        os.close(messages)
        processes[worker] = process_id
    for descriptor in shared:
        os.close(descriptor)
    return processes


def _become_worker(libc: ctypes.CDLL, worker: int, messages: int, shared: SharedDescriptors) -> None:
    """Run a worker in this fork, and end the process."""
    server_id = os.getppid()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        if os.getppid() == server_id:  # it has not ended between the fork and here
            run_worker(worker, messages, shared)
        status = 0
    except BaseException:  # noqa: BLE001 - the trainer reads the end of the pipe and says what this worker was reading
        sys.stderr.write(redact(traceback.format_exc()))
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait_for_exit(process_id: int) -> int:
    """Return the exit code of a worker that ends; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
