"""The store through which ranks speak: torchrun's agent serves it, or else rank 0, on a port that is free.

Ranks of several runs may come to one address: two runs given the same MASTER_PORT, a step beside another, a rank that an
earlier attempt has left. So rank 0 writes down whose the store is (``RunIdentity``), every other rank compares before it
says a word, and all that ranks say stands under the key of their run.

The store knows no password. It listens on the address that the ranks use, and whoever reaches that can read and write
it: it holds settings, host names, and the addresses of the ranks, no data and no weights.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from foveal.distributed.launcher import Seat, agent_serves, places
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import Hung, LaunchError, RankConflict, Superseded
from foveal.timeouts import within

Place = tuple[str, int]  # host and port
_LOOKS = 0.5  # seconds between two looks, once the first few were quick
_CONNECTING = 2.0  # seconds for a connection, where there are several places to look at
_ANSWERING = 10.0  # seconds for a store to answer there: another program may listen
_BACKLOG = 4096  # connections that may wait: all ranks of a large job come at once
_log = logging.getLogger(__name__)


def open_store(here: Seat, run: RunIdentity, seconds: float) -> dist.Store:
    """Serve the store of a run, or connect to it; what ranks write stands under the run's key.

    MASTER_ADDR and MASTER_PORT are set to where it is. Errors: as ``meet``.
    """
    there, deadline = places(here), time.monotonic() + seconds
    if serves(here):
        store, place = _served(there, run, seconds)
    else:
        store, place = _reached(there, here, run, deadline, seconds)
    os.environ |= {"MASTER_ADDR": place[0], "MASTER_PORT": str(place[1])}
    return dist.PrefixStore(f"foveal/{run.key}", store)


def serves(here: Seat) -> bool:
    """Whether this rank serves the store: rank 0, unless torchrun's agent does."""
    return here.rank == 0 and not (here.launcher == "torchrun" and agent_serves())


# --- rank 0 ---


def _served(there: list[Place], run: RunIdentity, seconds: float) -> tuple[dist.Store, Place]:
    """A store on the first of these places that is this node's and free, with the run's identity in it."""
    refused: list[str] = []
    for host, port in there:
        try:
            listener = _listening(host, port)
        except OSError as error:
            refused.append(_why_not(host, port, error))
            continue
        store = dist.TCPStore(
            host,
            port,
            run.size,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        store.set(_owner_key(), run.text())
        if refused:
            _log.warning("%s; the ranks meet at %s:%d", refused[0], host, port)
        return store, (host, port)
    sentence = f"rank 0 cannot serve the ranks' store: {refused[0]}"
    if len({port for _, port in there}) > 1:  # every port that this start could draw: the next one draws others
        raise Hung(f"{sentence}, and {len(refused) - 1} further places were not free either")
    host, port = there[0]
    if refused[0] == _in_use(host, port) and (owner := _owner_at(host, port)):
        advice = "it is started already" if owner == run else f"set another MASTER_PORT for {run}"
        raise RankConflict(f"{host}:{port} is where the ranks of {owner} meet: {advice}")
    raise LaunchError(f"{sentence}; set MASTER_ADDR to this node's name and MASTER_PORT to a port that is free there")


def _listening(host: str, port: int) -> socket.socket:
    """A listener on the address that the ranks use. Errors: OSError where that is not this node's, or not free.

    On some distributions a node's own name is 127.0.1.1 to itself alone: then on all addresses.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if all(ipaddress.ip_address(at[0]).is_loopback for *_, at in found) and not _is_loopback(host):
        return _bound(socket.AF_INET, ("", port))
    failed: list[OSError] = []
    for family, _, _, _, at in found:
        try:
            return _bound(family, at)
        except OSError as error:
            failed.append(error)
    raise next((each for each in failed if each.errno == errno.EADDRINUSE), failed[0])


def _bound(family: int, at: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # over what the last attempt's connections left
        listener.bind(at)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_loopback(host: str) -> bool:
    """Whether somebody asked for the loopback: by address, or as localhost."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _why_not(host: str, port: int, error: OSError) -> str:
    node = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        return _in_use(host, port)
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"MASTER_ADDR={host} is no address of {node}, where rank 0 is"
    return f"{host}:{port} cannot be served on {node} ({error})"


def _in_use(host: str, port: int) -> str:
    return f"another program listens at {host}:{port}"


def _owner_at(host: str, port: int) -> RunIdentity | None:
    """Whose the store at a place is; nothing where another program listens."""
    try:
        return _owner_of(_client(host, port, _ANSWERING), _CONNECTING)
    except (dist.DistError, TimeoutError):
        return None


def _owner_of(store: dist.Store, seconds: float) -> RunIdentity | None:
    """Whose a store is, as soon as it says so: it is there before its owner has written, torchrun's by minutes."""
    until = time.monotonic() + seconds
    while not store.check([_owner_key()]):
        if time.monotonic() > until:
            return None
        time.sleep(0.05)
    return RunIdentity.parse(store.get(_owner_key()).decode())


def _owner_key() -> str:
    """An agent's store outlives the attempts of its torchrun."""
    return f"foveal/owner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


# --- the others ---


def _reached(
    there: list[Place], here: Seat, run: RunIdentity, deadline: float, seconds: float
) -> tuple[dist.Store, Place]:
    """The store of the run, at the first place where it is found; what other programs and runs serve is passed over."""
    began, silent, why = time.monotonic(), set(), ""
    while True:
        for host, port in there:
            if host in silent:
                continue
            left = max(1.0, deadline - time.monotonic())
            try:
                socket.create_connection((host, port), timeout=left if len(there) == 1 else _CONNECTING).close()
            except OSError as error:
                why = in_short(error)
                if isinstance(error, TimeoutError | socket.gaierror):
                    silent.add(host)  # for this round: each further port would take as long
                continue
            try:
                if store := _own_store(host, port, here, run, left, alone=len(there) == 1):
                    return store, (host, port)
                why = "what answers there is no store of this run"
            except (TimeoutError, dist.DistError) as error:
                why = in_short(error)
        silent.clear()
        if time.monotonic() >= deadline:
            host, port = there[0]
            raise LaunchError(
                f"rank 0 was not there within {seconds:.0f} s: {host}:{port} does not answer ({why}); see why rank 0 did not "
                f"start, or set MASTER_ADDR and MASTER_PORT to where it is"
            )
        time.sleep(min(_LOOKS, 0.02 + time.monotonic() - began))


def _own_store(host: str, port: int, here: Seat, run: RunIdentity, left: float, *, alone: bool) -> dist.Store | None:
    """The store at a place if it is of this run; nothing if there are other places, and this one is not.

    Errors: RankConflict where the store is another run's and there is no other place, or the same launch has made it;
    Superseded where it is that of a later attempt.
    """
    patience = left if alone else min(left, _ANSWERING)
    store = _client(host, port, patience)
    if here.rank == 0:  # torchrun's agent serves
        store.compare_set(_owner_key(), "", run.text())
    owner = _owner_of(store, patience)
    if owner is None:
        return None
    kinship = run.kinship(owner)
    if kinship == "same":
        return store
    if kinship == "newer":
        raise Superseded(f"{host}:{port} is where a later attempt of this job meets; this rank is of an earlier one")
    if kinship == "older" or (kinship == "stranger" and not alone):
        return None
    if (
        kinship == "sibling" or not owner.launcher_starts_all
    ):  # the run that meets here may miss the rank that came as this
        said = f"rank {here.rank} of {run}, on {socket.gethostname()}"
        store.set(f"foveal/{owner.key}/stranger", said)
    raise RankConflict(
        f"{host}:{port} is where the ranks of {owner} meet, and rank {here.rank} is of {run}: {run.differences(owner)}; "
        f"give each run a MASTER_PORT of its own, and all ranks of a run the same settings"
    )


def _client(host: str, port: int, seconds: float) -> dist.TCPStore:
    """A connection of one's own. Errors: TimeoutError, torch's DistNetworkError.

    torch takes a client for connected only when the server has answered, and waits for ever if that is stopped.
    """
    limit = timedelta(seconds=seconds)
    return within(
        seconds, lambda: dist.TCPStore(host, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    )


def connect(seconds: float, key: str) -> dist.Store:
    """A further connection to the store where the ranks of a run met, to its words: ``key`` is the run's.

    Errors: TimeoutError, torch's DistNetworkError.
    """
    return dist.PrefixStore(f"foveal/{key}", _client(*_address(), seconds))


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


def _address() -> tuple[str, int]:
    """Where the ranks have met."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def in_short(error: BaseException) -> str:
    """The first line of an error."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
