"""Communication of a preflight's ranks through a store: a rank that hangs or never joins does not block the others."""

import faulthandler
import json
import os
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
from foveal.slurm import current_node_name
from foveal.timeouts import call_with_timeout

_POLL_SECONDS = 0.1  # between two reads of the store
_BEGIN_KEY = "begun"
_GRACE_SECONDS = 5.0  # beyond the time that rank 0 waits for the others
_RANK0_EXIT_SECONDS = 3.0  # rank 0 waits this long for the others to leave
_LATENCY_BYTES, _LATENCY_ROUNDS = 8, 20
_BANDWIDTH_BYTES, _BANDWIDTH_ROUNDS = {"cuda": 1 << 28, "cpu": 1 << 22}, 5


@dataclass(frozen=True)
class PreflightGroup:
    """This rank and the store that it shares with the other ranks. Entries outlive the rank that wrote them."""

    launch_env: LaunchEnv
    device: torch.device
    node: str
    _store: dist.Store
    _began: float

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the preflight began, by this rank's clock."""
        return time.monotonic() - self._began

    def post_status(self, status: str) -> None:
        """Write the next activity of this rank into the store, so that it can be named if it never ends."""
        self._store.set(f"doing/{self.launch_env.rank}", status)

    def post_report(self, topic: str, findings: dict[str, Any]) -> None:
        """Publish this rank's findings on a topic."""
        self._store.set(f"{topic}/{self.launch_env.rank}", json.dumps(findings))

    def gather_reports_until(self, topic: str, max_elapsed_seconds: float) -> dict[int, dict[str, Any]]:
        """Wait for all ranks' findings on a topic. Return them by rank; after ``max_elapsed_seconds`` seconds those that exist."""
        reports: dict[int, dict[str, Any]] = {}
        while True:
            for rank in set(range(self.launch_env.world_size)) - set(reports):
                if self._store.check([f"{topic}/{rank}"]):
                    reports[rank] = json.loads(self._store.get(f"{topic}/{rank}"))
            if len(reports) == self.launch_env.world_size or self.elapsed_seconds > max_elapsed_seconds:
                return reports
            time.sleep(_POLL_SECONDS)

    def last_node_and_status(self, rank: int) -> tuple[str, str] | None:
        """Return the node and the last status of a rank; None if the rank never joined."""
        if not self._store.check([f"here/{rank}"]):
            return None
        status = self._store.get(f"doing/{rank}").decode() if self._store.check([f"doing/{rank}"]) else "starting"
        return self._store.get(f"here/{rank}").decode(), status

    def announce(self, key: str, value: Any) -> None:
        """Publish a value of rank 0."""
        self._store.set(key, json.dumps(value))

    def wait_for_announcement(self, key: str, max_elapsed_seconds: float) -> Any:
        """Return a value that rank 0 announced; None if it is not there after ``max_elapsed_seconds`` seconds."""
        while not self._store.check([key]):
            if self.elapsed_seconds > max_elapsed_seconds:
                return None
            time.sleep(_POLL_SECONDS / 10)
        return json.loads(self._store.get(key))

    def check_all_reduce_rates(self, timeout_seconds: float) -> dict[str, float]:
        """Check and time all-reduces of all ranks. Return ``latency`` in seconds and ``bandwidth`` in bytes per second.

        Bandwidth is that of a ring, as in nccl-tests.
        Raises: LaunchError if an all-reduce fails, is wrong or does not end in time.
        """
        if self.launch_env.world_size == 1:
            return {}
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            return call_with_timeout(timeout_seconds, lambda: self._run_all_reduces(backend, timeout_seconds))
        except LaunchError:
            raise
        except Exception as error:
            abort_process_group()
            raise LaunchError(
                f"rank {self.launch_env.rank} on {self.node}: an all-reduce over {backend} failed "
                f"({str(error).splitlines()[0]}); choose the network interface (slurm/environment.sh: "
                f"NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) or leave out the node that cannot be reached"
            ) from error

    def _run_all_reduces(self, backend: str, seconds: float) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        rank, size = self.launch_env.rank, self.launch_env.world_size
        dist.init_process_group(
            backend, store=self._store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        small = torch.zeros(_LATENCY_BYTES // 4, device=self.device)
        large = torch.full((_BANDWIDTH_BYTES[self.device.type] // 4,), rank + 1.0, device=self.device)
        dist.all_reduce(large)
        expected = size * (size + 1) / 2
        wrong = int((large != expected).sum())
        if wrong:
            raise LaunchError(
                f"rank {rank} on {self.node}: {wrong} of {large.numel()} sums of an all-reduce are wrong; "
                f"a link or a memory on the way corrupts data"
            )
        rates = {
            "latency": _time_all_reduce(small, _LATENCY_ROUNDS),
            "bandwidth": 2 * (size - 1) / size * large.nbytes / _time_all_reduce(large, _BANDWIDTH_ROUNDS),
        }
        dist.destroy_process_group()
        return rates


@contextmanager
def join_preflight(join_timeout: float, exit_after_seconds: float) -> Iterator[PreflightGroup]:
    """Join the ranks of a preflight, and begin once all have joined or ``join_timeout`` seconds are over.

    The time before a rank joins, such as imports from a cold disk, does not count against it. This process ends
    ``exit_after_seconds`` seconds after the beginning, whatever hangs.
    Raises: LaunchError if rank 0, which serves the store, does not join within ``join_timeout`` seconds.
    """
    faulthandler.dump_traceback_later(2 * join_timeout + exit_after_seconds, exit=True)
    try:
        launch_env = read_launch_env()
        device = select_device(launch_env)
        node = current_node_name()
        store = _open_preflight_store(launch_env, join_timeout)
        set_rank_env_vars(launch_env, device)
        store.set(f"here/{launch_env.rank}", node)
        _wait_for_ranks(store, launch_env, node, join_timeout)
        faulthandler.dump_traceback_later(exit_after_seconds, exit=True)
        yield PreflightGroup(launch_env, device, node, store, time.monotonic())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait_for_ranks(store: dist.Store, launch_env: LaunchEnv, node: str, join_timeout: float) -> None:
    """Wait for rank 0 to begin the preflight. torchrun's agent may serve the store before rank 0 has joined."""
    started = time.monotonic()
    if launch_env.rank == 0:
        absent = set(range(launch_env.world_size))
        while absent and time.monotonic() < started + join_timeout:
            absent = {rank for rank in absent if not store.check([f"here/{rank}"])}
            time.sleep(_POLL_SECONDS / 10)
        store.set(_BEGIN_KEY, "")
    while not store.check([_BEGIN_KEY]):
        if time.monotonic() > started + join_timeout + _GRACE_SECONDS:
            raise LaunchError(
                f"rank 0 did not come within {join_timeout:.0f} s, as rank {launch_env.rank} on {node} sees it"
            )
        time.sleep(_POLL_SECONDS)


def exit_preflight(group: PreflightGroup, exit_code: int) -> NoReturn:
    """End this process, whatever threads a check left behind; rank 0 waits for the others to read the verdict."""
    if group.launch_env.world_size == 1:
        sys.exit(exit_code)
    group.post_report("left", {})
    if group.launch_env.rank == 0:
        # Rank 0 serves the store and leaves last.
        group.gather_reports_until("left", group.elapsed_seconds + _RANK0_EXIT_SECONDS)
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
    """Return the median duration of an all-reduce in seconds."""
    durations = []
    for _ in range(rounds):
        if tensor.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[rounds // 2]
