"""Errors and Ctrl-C as the last line of a process: one sentence on stderr, no traceback, also in torchrun's report."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT
COMMAND_INTERRUPTED = "stopped by Ctrl-C; the same command starts again"
INTERRUPTED = "stopped by Ctrl-C before anything was trained; the same command starts again"
_TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's report on a failed rank quotes this file


def report_error(sentence: str, *, on_stderr: bool = True) -> None:
    """Write the sentence with which this process ends to stderr and, under torchrun, into the report of its launcher."""
    if on_stderr:
        sys.stderr.write(f"foveal: {sentence}\n")
    if file := os.environ.get(_TORCHRUN_ERROR_FILE):
        message = {
            "message": sentence,
            "extraInfo": {"py_callstack": f"foveal: {sentence}", "timestamp": str(int(time.time()))},
        }
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}))


def is_first_local_rank() -> bool:
    """Whether this process is the first of its launcher on this node, by what the launcher states; alone it is."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def exit_at_once_on_interrupt(sentence: str = INTERRUPTED, *, on_stderr: bool = True) -> Iterator[None]:
    """End the process at once on Ctrl-C, with one sentence: for imports that take seconds and hold nothing to clean up.

    A KeyboardInterrupt inside the import of a library often becomes another error. Any other handler of Ctrl-C stays.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(*_: Any) -> None:
        if on_stderr:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"foveal: {sentence}\n".encode())
        os._exit(INTERRUPTED_EXIT_CODE)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
