"""Where the ranks meet: a store at MASTER_ADDR:MASTER_PORT, served by torchrun's agent or else by rank 0."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from foveal.errors import LaunchError

T = TypeVar("T")
_PATIENT = 30.0  # seconds before a rank says whom it is waiting for
_LOOKS = 0.5  # seconds between two looks, once the first few were quick
_LINGERS = 4 * _LOOKS  # seconds that the server stays after giving up, so that the others read why
_log = logging.getLogger(__name__)


def meet(rank: int, size: int, seconds: float) -> dist.Store:
    """The store, once every rank has shown up in it.

    Errors: LaunchError after ``seconds`` at most, on every rank that did come, with the ranks that did not.
    """
    deadline = time.monotonic() + seconds
    serves = rank == 0 and not agent_serves()
    if not serves:
        reach(deadline, seconds)
    host, port = _address()
    try:
        store = connect(seconds, size=size, serves=serves)
        store.set(f"here/{rank}", socket.gethostname())
        _gather(store, rank, size, seconds, deadline)
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        if serves:
            raise LaunchError(
                f"rank 0 cannot serve on {host}:{port} ({_short(error)}): set MASTER_PORT to a port that is free there, and "
                f"MASTER_ADDR to this node's name"
            ) from error
        raise LaunchError(
            f"rank {rank} found {host}:{port}, but the ranks did not meet there ({_short(error)}); the log of rank 0 says "
            f"why, unless another program answers at that port: then set MASTER_PORT"
        ) from error
    except LaunchError:
        if serves:
            time.sleep(_LINGERS)
        raise
    return store


def connect(seconds: float, *, size: int | None = None, serves: bool = False) -> dist.Store:
    """A connection of one's own to the store, under this attempt's prefix: an old rank that wanders in meets nobody.

    Errors: TimeoutError, torch's DistNetworkError.
    """
    host, port = _address()
    # torch takes a client for connected only when the server has answered, and waits for ever if that is stopped.
    store = within(
        seconds,
        lambda: dist.TCPStore(
            host,
            port,
            size,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=serves,
        ),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return dist.PrefixStore(f"foveal/{'/'.join(attempt)}", store)


class Lifeline:
    """A connection over which nothing is said: it ends when the server does, and unlike torch's it can be asked.

    torch writes a page of C++ frames to stderr for each word to a store that is gone.
    """

    def __init__(self, seconds: float) -> None:
        self._line = socket.create_connection(_address(), timeout=seconds)
        self._line.setblocking(False)

    def holds(self) -> bool:
        """Whether the server is there, as far as its node's kernel knows."""
        try:
            return self._line.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """End the connection."""
        self._line.close()


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises, if it comes back in time. Errors: TimeoutError; the call is then left behind."""
    came: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            came.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not came:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return came[0]


def ranks_in_words(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-1, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(end) for end in run) for run in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def agent_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise LaunchError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}: set them to the node of rank 0 and a port that is free "
            f"there, or start with torchrun or srun"
        )
    return host, int(port)


def reach(deadline: float, seconds: float) -> None:
    """Wait until somebody answers; torch would, too, but with pages of C++ frames on stderr."""
    address, began = _address(), time.monotonic()
    while True:
        try:
            with socket.create_connection(address, timeout=max(1.0, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise LaunchError(
                    f"rank 0 was not there within {seconds:.0f} s: {address[0]}:{address[1]} does not answer ({_short(error)}); "
                    f"see why rank 0 did not start, or set MASTER_ADDR and MASTER_PORT to where it is"
                ) from None
        time.sleep(min(_LOOKS, 0.02 + time.monotonic() - began))


def _gather(store: dist.Store, rank: int, size: int, seconds: float, deadline: float) -> None:
    """Wait for everybody. One number is looked at, whatever the number of ranks."""
    came, began, said = store.add("came", 1), time.monotonic(), False
    while came < size:
        if store.check(["given-up"]):
            raise LaunchError(store.get("given-up").decode())
        now = time.monotonic()
        if now >= deadline:
            store.set("given-up", _absent(store, size, seconds))
            continue
        if now - began > _PATIENT and not said:
            said = True
            _log.warning("rank %d waits: %d of %d ranks have come", rank, came, size)
        time.sleep(min(_LOOKS, 0.02 + now - began))
        came = store.add("came", 0)


def _absent(store: dist.Store, size: int, seconds: float) -> str:
    here = {rank: store.get(f"here/{rank}").decode() for rank in range(size) if store.check([f"here/{rank}"])}
    hosts = [
        f"{ranks_in_words(rank for rank in here if here[rank] == host)} on {host}"
        for host in dict.fromkeys(here.values())
    ]
    return (
        f"{len(here)} of {size} ranks came within {seconds:.0f} s ({'; '.join(hosts)}), but not "
        f"{ranks_in_words(set(range(size)) - set(here))}: see why they did not start there, and start again"
    )


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
