"""The ranks' key-value store (torch's TCPStore), served by torchrun's agent or by rank 0 on a free port.

Ranks of several runs may connect to one address: two runs with the same MASTER_PORT, two steps of a job, a rank left
over from an earlier attempt. Rank 0 therefore writes its run's identity (``RunIdentity``) into the store, every other
rank compares the identity before it writes, and all keys have the run's key as prefix.

The store has no password. It listens on the address that the ranks use; any process that reaches the address can read
and write it. It holds settings, host names and rank addresses, no data and no weights.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from foveal.distributed.launcher import LaunchEnv, candidate_store_addresses, torchrun_agent_serves_store
from foveal.distributed.open_files import check_agent_connections, check_store_connections, diagnose_file_limit
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import AttemptSupersededError, LaunchError, RankConflictError, TrainingHungError
from foveal.timeouts import call_with_timeout

Address = tuple[str, int]  # host and port
_POLL_SECONDS = 0.5  # between two tries to connect; the first few follow one another faster
_CONNECT_TIMEOUT_SECONDS = 2.0  # for one connection, if there are several addresses to try
_ANSWER_TIMEOUT_SECONDS = 10.0  # for the store's answer: another program may listen at the address
_BACKLOG = 4096  # pending connections: all ranks of a large job connect at once
_log = logging.getLogger(__name__)


def open_store(launch_env: LaunchEnv, identity: RunIdentity, timeout_seconds: float) -> dist.Store:
    """Serve the store of a run on rank 0, or connect to it. Return it with the run's key as prefix of all keys.

    Sets MASTER_ADDR and MASTER_PORT to the store's address. Raises: see ``join_rendezvous``.
    """
    addresses, deadline = candidate_store_addresses(launch_env), time.monotonic() + timeout_seconds
    if is_store_host(launch_env):
        check_store_connections(launch_env.world_size)
        store, (host, port) = _serve_store(addresses, identity, timeout_seconds)
    else:
        if launch_env.rank == 0:  # torchrun's agent, which started it, serves the store
            check_agent_connections(launch_env.world_size)
        store, (host, port) = _find_store(addresses, launch_env, identity, deadline, timeout_seconds)
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return dist.PrefixStore(f"foveal/{identity.store_key}", store)


def is_store_host(launch_env: LaunchEnv) -> bool:
    """Whether this rank serves the store: rank 0, unless torchrun's agent does."""
    return launch_env.rank == 0 and not (launch_env.launcher == "torchrun" and torchrun_agent_serves_store())


# --- rank 0 ---


def _serve_store(addresses: list[Address], identity: RunIdentity, seconds: float) -> tuple[dist.Store, Address]:
    """Serve a store with the run's identity at the first address that belongs to this node and is free."""
    refusals: list[str] = []
    for host, port in addresses:
        try:
            listener = _open_listener(host, port)
        except OSError as error:
            refusals.append(_explain_bind_error(host, port, error))
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
        if refusals:
            _log.warning("%s; the ranks meet at %s:%d", refusals[0], host, port)
        return store, (host, port)
    sentence = f"rank 0 cannot serve the ranks' store: {refusals[0]}"
    if len({port for _, port in addresses}) > 1:  # all candidate ports are in use: the next start derives other ports
        raise TrainingHungError(f"{sentence}, and {len(refusals) - 1} further addresses were not free either")
    host, port = addresses[0]
    if refusals[0] == _port_in_use_message(host, port) and (owner := _read_owner_at(host, port)):
        advice = "it is started already" if owner == identity else f"set another MASTER_PORT for {identity}"
        raise RankConflictError(f"{host}:{port} is where the ranks of {owner} meet: {advice}")
    raise LaunchError(f"{sentence}; set MASTER_ADDR to this node's name and MASTER_PORT to a port that is free there")


def _open_listener(host: str, port: int) -> socket.socket:
    """Listen at the address that the ranks use. Raises: OSError if it is not an address of this node, or not free.

    Some distributions resolve a node's own name to 127.0.1.1 on that node: the listener then binds all addresses.
    """
    candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if all(ipaddress.ip_address(address[0]).is_loopback for *_, address in candidates) and not _is_loopback(host):
        return _bind_listener(socket.AF_INET, ("", port))
    errors: list[OSError] = []
    for family, _, _, _, address in candidates:
        try:
            return _bind_listener(family, address)
        except OSError as error:
            errors.append(error)
    raise next((error for error in errors if error.errno == errno.EADDRINUSE), errors[0])


def _bind_listener(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last attempt may linger
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _is_loopback(host: str) -> bool:
    """Whether a host is the loopback, by address or as localhost."""
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
    """Return the identity of the run whose store answers at an address; None if another program listens."""
    try:
        return _read_owner(_connect_client(host, port, _ANSWER_TIMEOUT_SECONDS), _CONNECT_TIMEOUT_SECONDS)
    except (dist.DistError, TimeoutError):
        return None


def _read_owner(store: dist.Store, seconds: float) -> RunIdentity | None:
    """Return the identity in a store; None if it is not there in time.

    A store exists before its owner has written the identity, torchrun's store by minutes.
    """
    deadline = time.monotonic() + seconds
    while not store.check([_owner_key()]):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return RunIdentity.from_json(store.get(_owner_key()).decode())


def _owner_key() -> str:
    """Return the key of the identity. It has the restart count, since an agent's store outlives torchrun's restarts."""
    return f"foveal/owner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


# --- other ranks ---


def _find_store(
    addresses: list[Address], launch_env: LaunchEnv, identity: RunIdentity, deadline: float, seconds: float
) -> tuple[dist.Store, Address]:
    """Return the run's store and its address, passing over addresses of other programs and runs."""
    began, silent_hosts, reason = time.monotonic(), set(), ""
    while True:
        for host, port in addresses:
            if host in silent_hosts:
                continue
            seconds_left = max(1.0, deadline - time.monotonic())
            timeout = seconds_left if len(addresses) == 1 else _CONNECT_TIMEOUT_SECONDS
            try:
                socket.create_connection((host, port), timeout=timeout).close()
            except OSError as error:
                if (file_limit := diagnose_file_limit(error)) is not None:
                    raise file_limit from error
                reason = summarize_error(error)
                if isinstance(error, TimeoutError | socket.gaierror):
                    silent_hosts.add(host)  # for this round: its other ports would time out too
                continue
            try:
                store = _connect_if_own(
                    host, port, launch_env, identity, seconds_left, only_address=len(addresses) == 1
                )
                if store:
                    return store, (host, port)
                reason = "the program that answers there is not the store of this run"
            except (TimeoutError, dist.DistError) as error:
                reason = summarize_error(error)
        silent_hosts.clear()
        if time.monotonic() >= deadline:
            host, port = addresses[0]
            raise LaunchError(
                f"rank 0 was not there within {seconds:.0f} s: {host}:{port} does not answer ({reason}); "
                f"see why rank 0 did not start, or set MASTER_ADDR and MASTER_PORT to where it is"
            )
        time.sleep(min(_POLL_SECONDS, 0.02 + time.monotonic() - began))


def _connect_if_own(
    host: str, port: int, launch_env: LaunchEnv, identity: RunIdentity, seconds_left: float, *, only_address: bool
) -> dist.Store | None:
    """Return the store at an address if it belongs to this run; None if it does not and other addresses remain.

    Raises: RankConflictError if the store belongs to another run and there is no other address, or to the same launch
    with other settings; AttemptSupersededError if it belongs to a later attempt.
    """
    timeout = seconds_left if only_address else min(seconds_left, _ANSWER_TIMEOUT_SECONDS)
    store = _connect_client(host, port, timeout)
    if launch_env.rank == 0:  # a client only under torchrun, whose agent serves the store
        store.compare_set(_owner_key(), "", identity.to_json())
    owner = _read_owner(store, timeout)
    if owner is None:
        return None
    relation = identity.relation_of(owner)
    if relation == "same":
        return store
    if relation == "newer":
        raise AttemptSupersededError(
            f"{host}:{port} is where a later attempt of this job meets; this rank is of an earlier one"
        )
    if relation == "older" or (relation == "stranger" and not only_address):
        return None
    if relation == "sibling" or not owner.launcher_starts_all_ranks:
        # This process may have come in place of a rank that the owner waits for: tell the owner.
        stranger = f"rank {launch_env.rank} of {identity}, on {socket.gethostname()}"
        store.set(f"foveal/{owner.store_key}/stranger", stranger)
    raise RankConflictError(
        f"{host}:{port} is where the ranks of {owner} meet, and rank {launch_env.rank} is of {identity}: "
        f"{identity.describe_differences(owner)}; "
        f"give each run a MASTER_PORT of its own, and all ranks of a run the same settings"
    )


def _connect_client(host: str, port: int, seconds: float) -> dist.TCPStore:
    """Open a new connection to a store. Raises: TimeoutError or torch's DistNetworkError.

    torch waits for the server's answer, for ever if the server is stopped, so the call has a timeout of its own.
    """
    limit = timedelta(seconds=seconds)
    return call_with_timeout(
        seconds, lambda: dist.TCPStore(host, port, None, is_master=False, timeout=limit, wait_for_workers=False)
    )


def open_extra_store_connection(timeout_seconds: float, store_key: str) -> dist.Store:
    """Open another connection to the store that the ranks joined, with the run's ``store_key`` as prefix of all keys.

    Raises: TimeoutError or torch's DistNetworkError.
    """
    return dist.PrefixStore(f"foveal/{store_key}", _connect_client(*_store_address(), timeout_seconds))


def read_published(store: dist.Store, keys: Sequence[str]) -> dict[str, bytes]:
    """Return the values of the keys that exist: two requests if all do, and a few more for each that does not.

    torch's ``multi_get`` waits for keys that do not exist, so the halves of a list with such a key are asked in turn.
    """
    if not keys:
        return {}
    if store.check(list(keys)):
        return dict(zip(keys, store.multi_get(list(keys)), strict=True))
    middle = len(keys) // 2
    return read_published(store, keys[:middle]) | read_published(store, keys[middle:]) if middle else {}


class StoreServerProbe:
    """An idle connection to the store's server, which shows whether the server still runs.

    torch has no such query, and writes a page of C++ frames to stderr for each request to a store that is gone.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._connection = socket.create_connection(_store_address(), timeout=timeout_seconds)
        self._connection.setblocking(False)

    def is_alive(self) -> bool:
        """Whether the connection is open: the kernel of the server's node closes it when the server ends."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _store_address() -> tuple[str, int]:
    """Return the address of the store that the ranks joined."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has no message."""
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
