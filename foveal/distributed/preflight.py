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

from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.distributed.peer_failure import abort_process_group
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import open_store, summarize_error
from foveal.distributed.world import select_device, set_rank_env_vars
from foveal.errors import LaunchError
from foveal.timeouts import call_with_timeout

_POLL_SECONDS = 0.1  # seconds between two looks into the store
_BEGIN_KEY = "begun"
_GRACE = 5.0  # seconds beyond what rank 0 waits for the others
_RANK0_EXIT_SECONDS = 3.0  # seconds that rank 0 waits for the others to leave
_SMALL, _ROUNDS = 8, 20  # bytes and repetitions for the latency
_LARGE = {"cuda": 1 << 28, "cpu": 1 << 22}  # bytes for the bandwidth
_FEW = 5


@dataclass(frozen=True)
class PreflightGroup:
    """This rank among those that came; what is said here outlives whoever said it."""

    launch_env: LaunchEnv
    device: torch.device
    node: str
    _store: dist.Store
    _began: float

    @property
    def elapsed_seconds(self) -> float:
        """Since the ranks began, as this rank saw it."""
        return time.monotonic() - self._began

    def post_status(self, status: str) -> None:
        """Say what comes next, so that it can be told if it never ends."""
        self._store.set(f"doing/{self.launch_env.rank}", status)

    def post_report(self, topic: str, findings: dict[str, Any]) -> None:
        """Tell everybody."""
        self._store.set(f"{topic}/{self.launch_env.rank}", json.dumps(findings))

    def gather_reports(self, topic: str, deadline: float) -> dict[int, dict[str, Any]]:
        """What every rank said of a topic, by rank, as soon as all have, and at ``until`` seconds what there is."""
        found: dict[int, dict[str, Any]] = {}
        while True:
            for rank in set(range(self.launch_env.world_size)) - set(found):
                if self._store.check([f"{topic}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{topic}/{rank}"))
            if len(found) == self.launch_env.world_size or self.elapsed_seconds > deadline:
                return found
            time.sleep(_POLL_SECONDS)

    def last_status(self, rank: int) -> tuple[str, str] | None:
        """The node of a rank and what it was doing last; nothing if it never came."""
        if not self._store.check([f"here/{rank}"]):
            return None
        doing = self._store.get(f"doing/{rank}").decode() if self._store.check([f"doing/{rank}"]) else "starting"
        return self._store.get(f"here/{rank}").decode(), doing

    def announce(self, key: str, value: Any) -> None:
        """Rank 0's word to all."""
        self._store.set(key, json.dumps(value))

    def wait_for_announcement(self, key: str, deadline: float) -> Any:
        """Rank 0's word, and nothing if it did not come in time."""
        while not self._store.check([key]):
            if self.elapsed_seconds > deadline:
                return None
            time.sleep(_POLL_SECONDS / 10)
        return json.loads(self._store.get(key))

    def benchmark_all_reduce(self, timeout_seconds: float) -> dict[str, float]:
        """All-reduces among all ranks, checked and timed: ``latency`` in seconds, ``bandwidth`` in bytes a second.

        Bandwidth is that of a ring, as NCCL's tests give it. Raises: LaunchError where they fail or do not end in time.
        """
        if self.launch_env.world_size == 1:
            return {}
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            return call_with_timeout(timeout_seconds, lambda: self._all_reduces(backend, timeout_seconds))
        except LaunchError:
            raise
        except Exception as error:
            abort_process_group()
            raise LaunchError(
                f"rank {self.launch_env.rank} on {self.node}: an all-reduce over {backend} failed ({str(error).splitlines()[0]}); "
                f"choose the network interface (slurm/environment.sh: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) or leave out "
                f"the node that cannot be reached"
            ) from error

    def _all_reduces(self, backend: str, seconds: float) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        rank, size = self.launch_env.rank, self.launch_env.world_size
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
            "latency": _time_all_reduce(small, _ROUNDS),
            "bandwidth": 2 * (size - 1) / size * large.nbytes / _time_all_reduce(large, _FEW),
        }
        dist.destroy_process_group()
        return found


@contextmanager
def join_preflight(join_timeout: float, run_timeout: float) -> Iterator[PreflightGroup]:
    """Come to where the ranks meet, and begin when all have come, or after ``joining`` seconds without those who did not.

    Nothing that a rank imports from a cold disk is held against it, as long as it comes. From the beginning on, whatever
    hangs, this process ends after ``ending`` seconds.
    Raises: LaunchError if rank 0, which serves the store, is not there within ``joining`` seconds.
    """
    faulthandler.dump_traceback_later(2 * join_timeout + run_timeout, exit=True)
    try:
        here = read_launch_env()
        device = select_device(here)
        node = current_node_name()
        store = _open_preflight_store(here, join_timeout)
        set_rank_env_vars(here, device)
        store.set(f"here/{here.rank}", node)
        _wait_for_ranks(store, here, node, join_timeout)
        faulthandler.dump_traceback_later(run_timeout, exit=True)
        yield PreflightGroup(here, device, node, store, time.monotonic())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait_for_ranks(store: dist.Store, launch_env: LaunchEnv, node: str, join_timeout: float) -> None:
    """Rank 0 says when; torchrun's agent serves the store before rank 0 has come."""
    came = time.monotonic()
    if launch_env.rank == 0:
        absent = set(range(launch_env.world_size))
        while absent and time.monotonic() < came + join_timeout:
            absent = {rank for rank in absent if not store.check([f"here/{rank}"])}
            time.sleep(_POLL_SECONDS / 10)
        store.set(_BEGIN_KEY, "")
    while not store.check([_BEGIN_KEY]):
        if time.monotonic() > came + join_timeout + _GRACE:
            raise LaunchError(
                f"rank 0 did not come within {join_timeout:.0f} s, as rank {launch_env.rank} on {node} sees it"
            )
        time.sleep(_POLL_SECONDS)


def exit_preflight(group: PreflightGroup, exit_code: int) -> NoReturn:
    """End this process, once the others have heard what there was to hear, whatever a check has left behind."""
    if group.launch_env.world_size == 1:
        sys.exit(exit_code)
    group.post_report("left", {})
    if group.launch_env.rank == 0:
        group.gather_reports("left", group.elapsed_seconds + _RANK0_EXIT_SECONDS)  # who serves the store goes last
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _open_preflight_store(launch_env: LaunchEnv, join_timeout: float) -> dist.Store:
    if launch_env.world_size == 1:
        return dist.HashStore()
    try:
        return open_store(launch_env, RunIdentity.from_launch_env(launch_env, "doctor"), join_timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LaunchError(
            f"rank {launch_env.rank} on {current_node_name()} could not meet the others ({summarize_error(error)})"
        ) from error


def _time_all_reduce(tensor: torch.Tensor, rounds: int) -> float:
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


def current_node_name() -> str:
    """This node, as Slurm calls it where there is Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_names_by_rank(world_size: int) -> list[str]:
    """Which node Slurm put each rank on, if it dealt them node by node; empty outside of Slurm."""
    nodes = expand_node_list(os.environ.get("SLURM_STEP_NODELIST", ""))
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [int(count) for count, times in counts for _ in range(int(times or 1))]
    placed = [node for node, count in zip(nodes, tasks, strict=False) for _ in range(count)]
    return placed if len(placed) == world_size else []


def expand_node_list(node_list: str) -> list[str]:
    """Every host of a Slurm node list: ``a[01-03,7],c`` gives a01, a02, a03, a7, c."""
    found = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        names = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            ends = [""] if not ranges else [each for span in ranges.split(",") for each in _expand_range(span)]
            names = [f"{name}{text}{end}" for name in names for end in ends] if text or ranges else names
        found += names
    return found


def _expand_range(span: str) -> list[str]:
    first, _, last = span.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
