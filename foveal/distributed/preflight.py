"""The ranks of a preflight: they talk through the store, so that one that hangs or never comes keeps nobody waiting."""

import faulthandler
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from foveal.distributed.launcher import Seat, seat
from foveal.distributed.peer_failure import break_away
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import in_short, open_store
from foveal.distributed.world import device_of, tell_libraries
from foveal.errors import LaunchError
from foveal.timeouts import within

_LOOKS = 0.1  # seconds between two looks into the store
_BEGUN = "begun"
_GRACE = 5.0  # seconds beyond what rank 0 waits for the others
_LINGERS = 3.0  # seconds that rank 0 waits for the others to leave
_SMALL, _ROUNDS = 8, 20  # bytes and repetitions for the latency
_LARGE = {"cuda": 1 << 28, "cpu": 1 << 22}  # bytes for the bandwidth
_FEW = 5


@dataclass(frozen=True)
class Meeting:
    """This rank among those that came; what is said here outlives whoever said it."""

    seat: Seat
    device: torch.device
    node: str
    _store: dist.Store
    _began: float

    @property
    def seconds(self) -> float:
        """Since the ranks began, as this rank saw it."""
        return time.monotonic() - self._began

    def doing(self, what: str) -> None:
        """Say what comes next, so that it can be told if it never ends."""
        self._store.set(f"doing/{self.seat.rank}", what)

    def report(self, topic: str, findings: dict[str, Any]) -> None:
        """Tell everybody."""
        self._store.set(f"{topic}/{self.seat.rank}", json.dumps(findings))

    def reports(self, topic: str, until: float) -> dict[int, dict[str, Any]]:
        """What every rank said of a topic, by rank, as soon as all have, and at ``until`` seconds what there is."""
        found: dict[int, dict[str, Any]] = {}
        while True:
            for rank in set(range(self.seat.size)) - set(found):
                if self._store.check([f"{topic}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{topic}/{rank}"))
            if len(found) == self.seat.size or self.seconds > until:
                return found
            time.sleep(_LOOKS)

    def last_words(self, rank: int) -> tuple[str, str] | None:
        """The node of a rank and what it was doing last; nothing if it never came."""
        if not self._store.check([f"here/{rank}"]):
            return None
        doing = self._store.get(f"doing/{rank}").decode() if self._store.check([f"doing/{rank}"]) else "starting"
        return self._store.get(f"here/{rank}").decode(), doing

    def announce(self, word: str, value: Any) -> None:
        """Rank 0's word to all."""
        self._store.set(word, json.dumps(value))

    def heard(self, word: str, until: float) -> Any:
        """Rank 0's word, and nothing if it did not come in time."""
        while not self._store.check([word]):
            if self.seconds > until:
                return None
            time.sleep(_LOOKS / 10)
        return json.loads(self._store.get(word))

    def collective(self, seconds: float) -> dict[str, float]:
        """All-reduces among all ranks, checked and timed: ``latency`` in seconds, ``bandwidth`` in bytes a second.

        Bandwidth is that of a ring, as NCCL's tests give it. Errors: LaunchError where they fail or do not end in time.
        """
        if self.seat.size == 1:
            return {}
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            return within(seconds, lambda: self._all_reduces(backend, seconds))
        except LaunchError:
            raise
        except Exception as error:
            break_away()
            raise LaunchError(
                f"rank {self.seat.rank} on {self.node}: an all-reduce over {backend} failed ({str(error).splitlines()[0]}); "
                f"choose the network interface (slurm/environment.sh: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) or leave out "
                f"the node that cannot be reached"
            ) from error

    def _all_reduces(self, backend: str, seconds: float) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        rank, size = self.seat.rank, self.seat.size
        dist.init_process_group(
            backend, store=self._store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        small = torch.zeros(_SMALL // 4, device=self.device)
        large = torch.full((_LARGE[self.device.type] // 4,), rank + 1.0, device=self.device)
        dist.all_reduce(large)
        wanted = size * (size + 1) / 2
        wrong = int((large != wanted).sum())
        if wrong:
            raise LaunchError(
                f"rank {rank} on {self.node}: {wrong} of {large.numel()} sums of an all-reduce are wrong; a link or a memory on "
                f"the way corrupts data"
            )
        found = {
            "latency": _seconds_of(small, _ROUNDS),
            "bandwidth": 2 * (size - 1) / size * large.nbytes / _seconds_of(large, _FEW),
        }
        dist.destroy_process_group()
        return found


@contextmanager
def meeting(joining: float, ending: float) -> Iterator[Meeting]:
    """Come to where the ranks meet, and begin when all have come, or after ``joining`` seconds without those who did not.

    Nothing that a rank imports from a cold disk is held against it, as long as it comes. From the beginning on, whatever
    hangs, this process ends after ``ending`` seconds.
    Errors: LaunchError if rank 0, which serves the store, is not there within ``joining`` seconds.
    """
    faulthandler.dump_traceback_later(2 * joining + ending, exit=True)
    try:
        here = seat()
        device = device_of(here)
        node = node_name()
        store = _store(here, joining)
        tell_libraries(here, device)
        store.set(f"here/{here.rank}", node)
        _begin_together(store, here, node, joining)
        faulthandler.dump_traceback_later(ending, exit=True)
        yield Meeting(here, device, node, store, time.monotonic())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _begin_together(store: dist.Store, here: Seat, node: str, joining: float) -> None:
    """Rank 0 says when; torchrun's agent serves the store before rank 0 has come."""
    came = time.monotonic()
    if here.rank == 0:
        absent = set(range(here.size))
        while absent and time.monotonic() < came + joining:
            absent = {rank for rank in absent if not store.check([f"here/{rank}"])}
            time.sleep(_LOOKS / 10)
        store.set(_BEGUN, "")
    while not store.check([_BEGUN]):
        if time.monotonic() > came + joining + _GRACE:
            raise LaunchError(f"rank 0 did not come within {joining:.0f} s, as rank {here.rank} on {node} sees it")
        time.sleep(_LOOKS)


def leave(here: Meeting, code: int) -> NoReturn:
    """End this process, once the others have heard what there was to hear, whatever a check has left behind."""
    if here.seat.size == 1:
        sys.exit(code)
    here.report("left", {})
    if here.seat.rank == 0:
        here.reports("left", here.seconds + _LINGERS)  # who serves the store goes last
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store(here: Seat, joining: float) -> dist.Store:
    if here.size == 1:
        return dist.HashStore()
    try:
        return open_store(here, RunIdentity.of(here, "doctor"), joining)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LaunchError(f"rank {here.rank} on {node_name()} could not meet the others ({in_short(error)})") from error


def _seconds_of(tensor: torch.Tensor, rounds: int) -> float:
    """The median time of an all-reduce."""
    taken = []
    for _ in range(rounds):
        if tensor.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[rounds // 2]


def node_name() -> str:
    """This node, as Slurm calls it where there is Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def nodes_of_ranks(size: int) -> list[str]:
    """Which node Slurm put each rank on, if it dealt them node by node; empty outside of Slurm."""
    nodes = hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    placed = [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)]
    return placed if len(placed) == size else []


def hosts(nodes: str) -> list[str]:
    """Every host of a Slurm node list: ``a[01-03,7],c`` gives a01, a02, a03, a7, c."""
    found = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            ends = [""] if not ranges else [each for span in ranges.split(",") for each in _numbers(span)]
            names = [f"{name}{text}{end}" for name in names for end in ends] if text or ranges else names
        found += names
    return found


def _numbers(span: str) -> list[str]:
    first, _, last = span.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
