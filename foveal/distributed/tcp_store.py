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

from foveal.distributed.launcher import LaunchEnv, is_store_in_agent, rendezvous_addresses
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import AttemptSupersededError, LaunchError, RankConflictError, TrainingHungError
from foveal.timeouts import call_with_timeout

Address = tuple[str, int]  # host and port
_POLL_SECONDS = 0.5  # seconds between two looks, once the first few were quick
_CONNECT_TIMEOUT_SECONDS = 2.0  # seconds for a connection, where there are several places to look at
_ANSWER_TIMEOUT_SECONDS = 10.0  # seconds for a store to answer there: another program may listen
_BACKLOG = 4096  # connections that may wait: all ranks of a large job come at once
_log = logging.getLogger(__name__)


def open_store(launch_env: LaunchEnv, identity: RunIdentity, timeout_seconds: float) -> dist.Store:
    """Serve the store of a run, or connect to it; what ranks write stands under the run's key.

    MASTER_ADDR and MASTER_PORT are set to where it is. Raises: as ``meet``.
    """
    there, deadline = rendezvous_addresses(launch_env), time.monotonic() + timeout_seconds
    if is_store_host(launch_env):
        store, place = _serve_store(there, identity, timeout_seconds)
    else:
        store, place = _find_store(there, launch_env, identity, deadline, timeout_seconds)
    os.environ |= {"MASTER_ADDR": place[0], "MASTER_PORT": str(place[1])}
    return dist.PrefixStore(f"foveal/{identity.store_key}", store)


def is_store_host(launch_env: LaunchEnv) -> bool:
    """Whether this rank serves the store: rank 0, unless torchrun's agent does."""
    return launch_env.rank == 0 and not (launch_env.launcher == "torchrun" and is_store_in_agent())


# --- rank 0 ---


def _serve_store(addresses: list[Address], identity: RunIdentity, seconds: float) -> tuple[dist.Store, Address]:
    """A store on the first of these places that is this node's and free, with the run's identity in it."""
    refused: list[str] = []
    for host, port in addresses:
        try:
            listener = _open_listener(host, port)
        except OSError as error:
            refused.append(_explain_bind_error(host, port, error))
            continue
        store = dist.TCPStore(
            host,
            port,
            identity.world_size,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        store.set(_owner_key(), identity.to_json())
        if refused:
            _log.warning("%s; the ranks meet at %s:%d", refused[0], host, port)
        return store, (host, port)
    sentence = f"rank 0 cannot serve the ranks' store: {refused[0]}"
    if len({port for _, port in addresses}) > 1:  # every port that this start could draw: the next one draws others
        raise TrainingHungError(f"{sentence}, and {len(refused) - 1} further places were not free either")
    host, port = addresses[0]
    if refused[0] == _port_in_use_message(host, port) and (owner := _read_owner_at(host, port)):
        advice = "it is started already" if owner == identity else f"set another MASTER_PORT for {identity}"
        raise RankConflictError(f"{host}:{port} is where the ranks of {owner} meet: {advice}")
    raise LaunchError(f"{sentence}; set MASTER_ADDR to this node's name and MASTER_PORT to a port that is free there")


def _open_listener(host: str, port: int) -> socket.socket:
    """A listener on the address that the ranks use. Raises: OSError where that is not this node's, or not free.

    On some distributions a node's own name is 127.0.1.1 to itself alone: then on all addresses.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if all(ipaddress.ip_address(at[0]).is_loopback for *_, at in found) and not _is_loopback(host):
        return _bind_listener(socket.AF_INET, ("", port))
    failed: list[OSError] = []
    for family, _, _, _, at in found:
        try:
            return _bind_listener(family, at)
        except OSError as error:
            failed.append(error)
    raise next((each for each in failed if each.errno == errno.EADDRINUSE), failed[0])


def _bind_listener(family: int, at: tuple[Any, ...]) -> socket.socket:
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


def _explain_bind_error(host: str, port: int, error: OSError) -> str:
    node = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        return _port_in_use_message(host, port)
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"MASTER_ADDR={host} is no address of {node}, where rank 0 is"
    return f"{host}:{port} cannot be served on {node} ({error})"


def _port_in_use_message(host: str, port: int) -> str:
    return f"another program listens at {host}:{port}"


def _read_owner_at(host: str, port: int) -> RunIdentity | None:
    """Whose the store at a place is; nothing where another program listens."""
    try:
        return _read_owner(_connect_client(host, port, _ANSWER_TIMEOUT_SECONDS), _CONNECT_TIMEOUT_SECONDS)
    except (dist.DistError, TimeoutError):
        return None


def _read_owner(store: dist.Store, seconds: float) -> RunIdentity | None:
    """Whose a store is, as soon as it says so: it is there before its owner has written, torchrun's by minutes."""
    until = time.monotonic() + seconds
    while not store.check([_owner_key()]):
        if time.monotonic() > until:
            return None
        time.sleep(0.05)
    return RunIdentity.from_json(store.get(_owner_key()).decode())


def _owner_key() -> str:
    """An agent's store outlives the attempts of its torchrun."""
    return f"foveal/owner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


# --- the others ---


def _find_store(
    addresses: list[Address], launch_env: LaunchEnv, identity: RunIdentity, deadline: float, seconds: float
) -> tuple[dist.Store, Address]:
    """The store of the run, at the first place where it is found; what other programs and runs serve is passed over."""
    began, silent, why = time.monotonic(), set(), ""
    while True:
        for host, port in addresses:
            if host in silent:
                continue
            left = max(1.0, deadline - time.monotonic())
            try:
                socket.create_connection(
                    (host, port), timeout=left if len(addresses) == 1 else _CONNECT_TIMEOUT_SECONDS
                ).close()
            except OSError as error:
                why = summarize_error(error)
                if isinstance(error, TimeoutError | socket.gaierror):
                    silent.add(host)  # for this round: each further port would take as long
                continue
            try:
                if store := _connect_if_own(host, port, launch_env, identity, left, alone=len(addresses) == 1):
                    return store, (host, port)
                why = "what answers there is no store of this run"
            except (TimeoutError, dist.DistError) as error:
                why = summarize_error(error)
        silent.clear()
        if time.monotonic() >= deadline:
            host, port = addresses[0]
            raise LaunchError(
                f"rank 0 was not there within {seconds:.0f} s: {host}:{port} does not answer ({why}); see why rank 0 did not "
                f"start, or set MASTER_ADDR and MASTER_PORT to where it is"
            )
        time.sleep(min(_POLL_SECONDS, 0.02 + time.monotonic() - began))


def _connect_if_own(
    host: str, port: int, launch_env: LaunchEnv, identity: RunIdentity, left: float, *, alone: bool
) -> dist.Store | None:
    """The store at a place if it is of this run; nothing if there are other places, and this one is not.

    Raises: RankConflict where the store is another run's and there is no other place, or the same launch has made it;
    Superseded where it is that of a later attempt.
    """
    patience = left if alone else min(left, _ANSWER_TIMEOUT_SECONDS)
    store = _connect_client(host, port, patience)
    if launch_env.rank == 0:  # torchrun's agent serves
        store.compare_set(_owner_key(), "", identity.to_json())
    owner = _read_owner(store, patience)
    if owner is None:
        return None
    kinship = identity.relation_to(owner)
    if kinship == "same":
        return store
    if kinship == "newer":
        raise AttemptSupersededError(
            f"{host}:{port} is where a later attempt of this job meets; this rank is of an earlier one"
        )
    if kinship == "older" or (kinship == "stranger" and not alone):
        return None
    if (
        kinship == "sibling" or not owner.launcher_starts_all_ranks
    ):  # the run that meets here may miss the rank that came as this
        said = f"rank {launch_env.rank} of {identity}, on {socket.gethostname()}"
        store.set(f"foveal/{owner.store_key}/stranger", said)
    raise RankConflictError(
        f"{host}:{port} is where the ranks of {owner} meet, and rank {launch_env.rank} is of {identity}: {identity.describe_differences(owner)}; "
        f"give each run a MASTER_PORT of its own, and all ranks of a run the same settings"
    )


def _connect_client(host: str, port: int, seconds: float) -> dist.TCPStore:
    """A connection of one's own. Raises: TimeoutError, torch's DistNetworkError.

    torch takes a client for connected only when the server has answered, and waits for ever if that is stopped.
    """
    limit = timedelta(seconds=seconds)
    return call_with_timeout(
        seconds, lambda: dist.TCPStore(host, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    )


def connect_to_store(timeout_seconds: float, store_key: str) -> dist.Store:
    """A further connection to the store where the ranks of a run met, to its words: ``key`` is the run's.

    Raises: TimeoutError, torch's DistNetworkError.
    """
    return dist.PrefixStore(f"foveal/{store_key}", _connect_client(*_store_address(), timeout_seconds))


class ServerProbe:
    """A connection over which nothing is said: it ends when the server does, and unlike torch's it can be asked.

    torch writes a page of C++ frames to stderr for each word to a store that is gone.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._line = socket.create_connection(_store_address(), timeout=timeout_seconds)
        self._line.setblocking(False)

    def is_alive(self) -> bool:
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


def _store_address() -> tuple[str, int]:
    """Where the ranks have met."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def summarize_error(error: BaseException) -> str:
    """The first line of an error."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
