"""Collectives of small values between the ranks' processors, over gloo: no GPU takes part, and none is waited for.

The ranks form a tree of groups. Consecutive ranks are a group, its first rank is also in a group of the next level, and
so on up to a single group. Values go up to rank 0, combined in every group, and come down again. A rank has at most
``group_size - 1`` connections per level, and a value passes two messages per level: on 1,024 ranks with groups of 32
that is 62 connections and four messages. gloo's own all-reduce is a ring: 1,023 connections and 2,046 messages in turn.
"""

import ipaddress
import os
import pickle
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from foveal.distributed.open_files import diagnose_file_limit
from foveal.errors import LaunchError

GROUP_SIZE = 32  # two levels reach 1,024 ranks, and a group's first rank receives 31 messages
_LENGTH = struct.Struct("<q")
_FRAME_BYTES = 64  # the first message of a payload: its length and its beginning, which is mostly all of it
_INLINE_BYTES = _FRAME_BYTES - _LENGTH.size
_UP_TAG, _DOWN_TAG = 1, 2


class HostCollectives:
    """This rank's end of the tree. Every rank calls the same methods in the same order, from its main thread."""

    def __init__(self, groups: Sequence["RankGroup"]) -> None:
        """``groups``: those that this rank is in, from the lowest level up."""
        self._groups = list(groups)

    @classmethod
    def connect(
        cls, store: dist.Store, rank: int, world_size: int, timeout_seconds: float, group_size: int = GROUP_SIZE
    ) -> Self:
        """Connect all ranks. No collective waits longer than ``timeout_seconds`` for a rank.

        Raises: LaunchError if ranks of a group cannot reach each other; FileLimitError for too many open files.
        """
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack its options, send and recv
        options = gloo._Options()  # noqa: SLF001 - torch has no public names for them
        options._devices = [_open_gloo_device()]  # noqa: SLF001
        options._timeout = timedelta(seconds=timeout_seconds)  # noqa: SLF001
        options._threads = 1  # noqa: SLF001 - messages need none of them
        try:
            return cls(
                [
                    RankGroup.connect(dist.PrefixStore(f"host/{name}", store), position, size, options)
                    for name, position, size in _groups_of_rank(rank, world_size, group_size)
                ]
            )
        except RuntimeError as error:
            raise diagnose_file_limit(error) or LaunchError(
                f"rank {rank} of {world_size} could not connect to the others over gloo, which carries the ranks' "
                f"agreements ({str(error).splitlines()[0]}); if another rank stopped, its log says why, else choose "
                f"the network interface (slurm/environment.sh: GLOO_SOCKET_IFNAME)"
            ) from error

    def all_reduce(self, values: Sequence[float], combine: Callable[[Sequence[float]], float]) -> list[float]:
        """Return each number combined over ranks, in rank order, by ``max`` or ``sum``; the same on every rank."""
        layout = struct.Struct(f"<{len(values)}d")

        def combine_columns(payloads: list[bytes]) -> bytes:
            rows = [layout.unpack(payload) for payload in payloads]
            return layout.pack(*(combine(column) for column in zip(*rows, strict=True)))

        return list(layout.unpack(self._gather_and_share(layout.pack(*values), combine_columns)))

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order, on every rank. The values must pickle."""

        def concatenate(payloads: list[bytes]) -> bytes:
            return pickle.dumps([value for payload in payloads for value in _unpickle(payload)])

        return _unpickle(self._gather_and_share(pickle.dumps([value]), concatenate))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank. The value must pickle."""
        is_rank0 = all(group.is_first for group in self._groups)
        return _unpickle(self._closing_on_error(lambda: self._share(pickle.dumps(value) if is_rank0 else b"")))

    def close(self) -> None:
        """Close the connections. A rank that waits for this one fails at once, not at its timeout."""
        for group in self._groups:
            group.backend = None

    def _gather_and_share(self, payload: bytes, combine: Callable[[list[bytes]], bytes]) -> bytes:
        def run() -> bytes:
            combined = payload
            for group in self._groups:
                payloads = group.gather(combined)
                if group.is_first:
                    combined = combine(payloads)
            return self._share(combined)

        return self._closing_on_error(run)

    def _share(self, payload: bytes) -> bytes:
        for group in reversed(self._groups):
            payload = group.broadcast(payload)
        return payload

    def _closing_on_error(self, run: Callable[[], bytes]) -> bytes:
        """Run a collective. If it fails, the connections close, so that all ranks learn of a lost peer, not two."""
        try:
            return run()
        except RuntimeError:
            self.close()
            raise


@dataclass(slots=True)
class RankGroup:
    """A group of the tree: every message goes to its first rank or comes from it.

    ``backend``: the connections, which close when nothing refers to it; None for a group of one rank.
    """

    position: int
    size: int
    backend: Any

    @classmethod
    def connect(cls, store: dist.Store, position: int, size: int, options: Any) -> "RankGroup":
        """Connect to the other ranks of the group, which meet in the store."""
        gloo: Any = dist.ProcessGroupGloo
        return cls(position, size, gloo(store, position, size, options) if size > 1 else None)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of the group."""
        return self.position == 0

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the payloads of all ranks in rank order on the first rank; an empty list on the others."""
        others = range(1, self.size)
        if not self.is_first:
            self._send([0], payload, _UP_TAG)
            return []
        return [payload, *self._receive(others, _UP_TAG)]

    def broadcast(self, payload: bytes) -> bytes:
        """Return the first rank's payload on every rank."""
        if not self.is_first:
            return self._receive([0], _DOWN_TAG)[0]
        self._send(range(1, self.size), payload, _DOWN_TAG)
        return payload

    def _send(self, targets: Sequence[int], payload: bytes, tag: int) -> None:
        frame = (_LENGTH.pack(len(payload)) + payload[:_INLINE_BYTES]).ljust(_FRAME_BYTES, b"\0")
        self._transfer([(target, _to_tensor(frame)) for target in targets], tag, is_send=True)
        if rest := payload[_INLINE_BYTES:]:
            self._transfer([(target, _to_tensor(rest)) for target in targets], tag, is_send=True)

    def _receive(self, sources: Sequence[int], tag: int) -> list[bytes]:
        frames = {source: torch.empty(_FRAME_BYTES, dtype=torch.uint8) for source in sources}
        self._transfer(list(frames.items()), tag, is_send=False)
        beginnings = {source: frame.numpy().tobytes() for source, frame in frames.items()}
        lengths = {source: _LENGTH.unpack_from(beginning)[0] for source, beginning in beginnings.items()}
        rests = {
            source: torch.empty(length - _INLINE_BYTES, dtype=torch.uint8)
            for source, length in lengths.items()
            if length > _INLINE_BYTES
        }
        self._transfer(list(rests.items()), tag, is_send=False)
        return [
            beginnings[source][_LENGTH.size :][: lengths[source]]
            + (rests[source].numpy().tobytes() if source in rests else b"")
            for source in sources
        ]

    def _transfer(self, messages: Sequence[tuple[int, Tensor]], tag: int, *, is_send: bool) -> None:
        """Send or receive a message per rank, all at once, and wait for all."""
        works = [
            self._connected().send([message], other, tag) if is_send else self._connected().recv([message], other, tag)
            for other, message in messages
        ]
        try:
            while works:
                works.pop().wait()
        finally:
            works.clear()  # a traceback refers to this frame: the connections could not close

    def _connected(self) -> Any:
        """Return the connections. Raises: torch's DistNetworkError if an earlier error has closed them."""
        if self.backend is None:
            raise dist.DistNetworkError("this rank's connections are closed")
        return self.backend


def _unpickle(payload: bytes) -> Any:
    return pickle.loads(payload)  # noqa: S301 - from ranks of this run, as torch's collectives of objects do


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _groups_of_rank(rank: int, world_size: int, group_size: int) -> list[tuple[str, int, int]]:
    """Return the groups that a rank is in, from the lowest level up: name, position in the group, size of the group."""
    groups, stride = [], 1  # at a level, every stride-th rank takes part
    while stride < world_size and rank % stride == 0:
        participants, index = -(-world_size // stride), rank // stride
        number, position = divmod(index, group_size)
        groups.append((f"{stride}/{number}", position, min(group_size, participants - number * group_size)))
        stride *= group_size
    return groups


def _open_gloo_device() -> Any:
    """Return the network interface for the connections: that of GLOO_SOCKET_IFNAME, else the one that faces the store.

    gloo's own choice is the address of the host's name, which some distributions resolve to 127.0.1.1 on the host.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or (address := _local_address_facing_store()) is None:
        return dist.ProcessGroupGloo.create_default_device()
    return dist.ProcessGroupGloo.create_device(hostname=address)


def _local_address_facing_store() -> str | None:
    """Return the address from which this host reaches the ranks' store; None if other hosts cannot reach it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route; a datagram socket sends nothing
        local = probe.getsockname()[0]
    is_one_host = host == "localhost" or _is_loopback(host)
    return local if is_one_host or not _is_loopback(local) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
