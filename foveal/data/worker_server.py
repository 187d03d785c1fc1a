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

from foveal.data.worker_process import WorkerDescriptors, run_worker

_PR_SET_PDEATHSIG = 1
_MESSAGE_BYTES = 64


def serve(descriptor: int, modules: Sequence[str]) -> None:
    """Fork a worker for every message with descriptors; answer one without them by the worker's exit status.

    ``modules``: imported before the first fork.
    """
    for module in modules:
        importlib.import_module(module)
    server = socket.socket(fileno=descriptor)
    libc = ctypes.CDLL(None)  # loaded before the forks
    gc.collect()
    gc.freeze()  # a collection in a worker writes to no page that it shares
    processes: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, _MESSAGE_BYTES, len(WorkerDescriptors._fields))
        if not message:
            break
        worker = int(message)
        if not descriptors:
            server.send(str(_wait_for_exit(processes.pop(worker))).encode())
            continue
        process_id = os.fork()
        if not process_id:
            server.close()
            _become_worker(libc, worker, WorkerDescriptors(*descriptors))
        for passed in descriptors:
            os.close(passed)
        processes[worker] = process_id
    for process_id in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    for process_id in processes.values():
        _wait_for_exit(process_id)


def _become_worker(libc: ctypes.CDLL, worker: int, descriptors: WorkerDescriptors) -> None:
    """Run a worker in this fork, and end the process."""
    server_id = os.getppid()
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        if os.getppid() == server_id:  # it has not ended between the fork and here
            run_worker(worker, descriptors)
        status = 0
    except BaseException:  # noqa: BLE001 - the trainer reads the end of the pipe and says what this worker was reading
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait_for_exit(process_id: int) -> int:
    """Return the exit code of a worker that ends; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
