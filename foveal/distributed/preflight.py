"""Communication of a preflight's ranks: through a store, where a rank that hangs or never joins blocks no other rank.

NCCL runs without its own error handling: at a time-out or an error its thread would end the process by SIGABRT (code
134), which is requeued, before the verdict names a node. The time limits are this module's.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist

from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.distributed.open_files import raise_open_file_limit
from foveal.distributed.peer_failure import diagnose_launch_mistake, summarize_collective_error
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import open_store, read_published, summarize_error
from foveal.distributed.world import hung_if_restarted, select_device, set_rank_env_vars
from foveal.errors import LaunchError
from foveal.slurm import current_node_name
from foveal.timeouts import call_with_timeout

T = TypeVar("T")
_POLL_SECONDS = 0.1  # between two reads of the store
_MAX_POLLS_PER_SECOND = 10_000  # of all ranks together that wait for rank 0, which serves the store
_BEGIN_KEY = "begun"
_GRACE_SECONDS = 5.0  # beyond the time that rank 0 waits for the others
_RANK0_EXIT_SECONDS = 3.0  # rank 0 waits this long for the others to leave
_LATENCY_BYTES, _LATENCY_ROUNDS = 8, 20
_BANDWIDTH_BYTES, _BANDWIDTH_ROUNDS = {"cuda": 1 << 28, "cpu": 1 << 22}, 5
# A waiting call gets the error itself, and NCCL has no thread that ends the process.
_NCCL_VARIABLES = {
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


@dataclass(frozen=True, slots=True)
class PreflightTimeouts:
    """Time limits in seconds: for the checks of each rank, for NCCL's start, and for the all-reduces.

    The start takes longer with more ranks, and so does a ring: healthy large jobs must not fail for their size.
    """

    rank_checks: float
    connection: float
    all_reduces: float

    @classmethod
    def for_world_size(cls, world_size: int) -> Self:
        """Return the limits of a preflight: together about a minute for 8 ranks, and about 200 s for 1,024."""
        return cls(28.0, 20.0 + world_size / 8, 8.0 + world_size / 64)

    @property
    def collectives(self) -> float:
        """Seconds for all that ranks do together."""
        return self.connection + self.all_reduces

    @property
    def end(self) -> float:
        """Seconds after which a rank that still hangs is ended, beyond every wait for another rank."""
        return self.rank_checks + self.collectives + 2 * _GRACE_SECONDS


@dataclass(frozen=True)
class PreflightGroup:
    """This rank and the store that it shares with the other ranks. Entries outlive the rank that wrote them."""

    launch_env: LaunchEnv
    device: torch.device
    node: str
    timeouts: PreflightTimeouts
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
        """Publish this rank's findings on a topic, and count them."""
        self._store.set(f"{topic}/{self.launch_env.rank}", json.dumps(findings))
        self._store.add(f"{topic}/count", 1)

    def gather_reports_until(self, topic: str, max_elapsed_seconds: float) -> dict[int, dict[str, Any]]:
        """Wait for all ranks' findings on a topic. Return them by rank; after ``max_elapsed_seconds`` seconds those that exist."""
        size = self.launch_env.world_size
        while True:
            is_over = self.elapsed_seconds > max_elapsed_seconds
            # The count is one request for any number of ranks; the reports are read once.
            if is_over or self._store.add(f"{topic}/count", 0) >= size:
                reports = read_published(self._store, [f"{topic}/{rank}" for rank in range(size)])
                if is_over or len(reports) == size:
                    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in reports.items()}
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
            time.sleep(max(_POLL_SECONDS / 10, self.launch_env.world_size / _MAX_POLLS_PER_SECOND))
        return json.loads(self._store.get(key))

    def connect_ranks(self) -> None:
        """Connect this rank with all others, over NCCL on GPUs and gloo on CPUs.

        Raises: LaunchError if that fails or does not end in time; TrainingHungError in its place if Slurm restarted the
        job, unless NCCL refuses the launch.
        """
        if self.launch_env.world_size > 1:
            self._run_with_others("connecting", self.timeouts.connection, self._connect)

    def check_all_reduce_rates(self) -> dict[str, float]:
        """Check and time all-reduces of connected ranks. Return ``latency`` in seconds and ``bandwidth`` in bytes/s.

        Bandwidth is that of a ring, as in nccl-tests.
        Raises: as ``connect_ranks``, also if a sum is wrong.
        """
        if self.launch_env.world_size == 1:
            return {}
        return self._run_with_others("an all-reduce", self.timeouts.all_reduces, self._run_all_reduces)

    def _run_with_others(self, activity: str, timeout_seconds: float, call: Callable[[], T]) -> T:
        """Run a call that waits for other ranks. One that hangs keeps its thread until the process ends."""
        try:
            return call_with_timeout(timeout_seconds, call)
        except LaunchError:
            raise
        except Exception as error:
            if (mistake := diagnose_launch_mistake(error)) is not None:
                raise mistake from error
            with hung_if_restarted():
                raise LaunchError(
                    f"rank {self.launch_env.rank} on {self.node}: {activity} over {self._backend} failed "
                    f"({summarize_collective_error(error)}); choose the network interface (slurm/environment.sh: "
                    f"NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) or leave out the node that cannot be reached"
                ) from error

    @property
    def _backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def _connect(self) -> None:
        """Connect devices, and processors, whose agreements a run needs beside NCCL: a network may carry only one."""
        self._init_process_group()
        store, rank, size = (
            dist.PrefixStore("agreements", self._store),
            self.launch_env.rank,
            self.launch_env.world_size,
        )
        with hung_if_restarted():
            connected = HostCollectives.connect(store, rank, size, self.timeouts.connection)
        with closing(connected):
            connected.all_reduce([1], sum)  # all ranks are connected before one leaves

    def _init_process_group(self) -> None:
        device_id = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            os.environ |= _NCCL_VARIABLES
            device_id = self.device  # connects now, so that the all-reduces are timed without it
        dist.init_process_group(
            self._backend,
            store=self._store,
            rank=self.launch_env.rank,
            world_size=self.launch_env.world_size,
            timeout=timedelta(seconds=2 * self.timeouts.end),  # never reached: the limits here come first
            device_id=device_id,
        )

    def _run_all_reduces(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        rank, size = self.launch_env.rank, self.launch_env.world_size
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
        return {
            "latency": _time_all_reduce(small, _LATENCY_ROUNDS),
            "bandwidth": 2 * (size - 1) / size * large.nbytes / _time_all_reduce(large, _BANDWIDTH_ROUNDS),
        }


@contextmanager
def join_preflight(join_timeout: float) -> Iterator[PreflightGroup]:
    """Join the ranks of a preflight, and begin once all have joined or ``join_timeout`` seconds are over.

    The time before a rank joins, such as imports from a cold disk, does not count against it. This process ends
    ``timeouts.end`` seconds after the beginning, whatever hangs.
    Raises: LaunchError if rank 0, which serves the store, does not join within ``join_timeout`` seconds, FileLimitError
    if it may not hold the connections of all ranks.
    """
    launch_env = read_launch_env()
    timeouts = PreflightTimeouts.for_world_size(launch_env.world_size)
    faulthandler.dump_traceback_later(2 * join_timeout + timeouts.end, exit=True)
    try:
        raise_open_file_limit()
        device = select_device(launch_env)
        node = current_node_name()
        store = _open_preflight_store(launch_env, join_timeout)
        set_rank_env_vars(launch_env, device)
        store.set(f"here/{launch_env.rank}", node)
        _wait_for_ranks(store, launch_env, node, join_timeout)
        faulthandler.dump_traceback_later(timeouts.end, exit=True)
        yield PreflightGroup(launch_env, device, node, timeouts, store, time.monotonic())
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait_for_ranks(store: dist.Store, launch_env: LaunchEnv, node: str, join_timeout: float) -> None:
    """Wait for rank 0 to begin the preflight. torchrun's agent may serve the store before rank 0 has joined."""
    started = time.monotonic()
    if launch_env.rank == 0:
        keys = [f"here/{rank}" for rank in range(launch_env.world_size)]
        while not store.check(keys) and time.monotonic() < started + join_timeout:
            time.sleep(max(_POLL_SECONDS / 10, len(keys) / _MAX_POLLS_PER_SECOND))
        store.set(_BEGIN_KEY, "")
    while not store.check([_BEGIN_KEY]):
        if time.monotonic() > started + join_timeout + _GRACE_SECONDS:
            raise LaunchError(
                f"rank 0 did not come within {join_timeout:.0f} s, as rank {launch_env.rank} on {node} sees it"
            )
        time.sleep(_POLL_SECONDS)


def is_infiniband_disabled() -> bool:
    """Whether the environment tells NCCL to leave InfiniBand alone."""
    return os.environ.get("NCCL_IB_DISABLE") == "1"


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
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
        if tensor.is_cuda:
            torch.cuda.synchronize()  # a blocking wait would look at the collective every few milliseconds only
        else:
            assert work is not None
            work.wait()
        durations.append(time.perf_counter() - start)
    return sorted(durations)[rounds // 2]
