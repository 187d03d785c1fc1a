"""The process group: ranks of one run and their collectives."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from foveal.distributed.gpu_allocation import read_gpu_uuid
from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.distributed.open_files import raise_open_file_limit
from foveal.distributed.peer_failure import (
    abort_process_group,
    describe_peer_failure,
    diagnose_launch_mistake,
    dump_cpu_flight_recorder,
    enable_flight_recorder,
    summarize_collective_error,
)
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import FileLimitError, FovealError, LaunchError, RankConflictError, TrainingHungError
from foveal.slurm import describe_slurm_task, slurm_restart_count

T = TypeVar("T")
_JOIN_TIMEOUT_SECONDS = 600.0  # for all ranks to join: imports from a cold disk take minutes


@dataclass(frozen=True, slots=True)
class RankOutcome(Generic[T]):
    """What a function returned on this rank, and what all ranks know of it.

    ``total``: sum over ranks of what they measured, in rank order, the same bits on every rank. ``flags``: each is set
    if any rank set it.
    """

    total: float
    flags: tuple[bool, ...]
    any_failed: bool
    _result: T | None
    _failure: FovealError | None
    _gather: Callable[[FovealError | None], list[FovealError | None]] = field(repr=False)

    def result_or_raise(self) -> T:
        """Return this rank's result; raise the FovealError of the first rank that failed. A collective."""
        if not self.any_failed:
            return self._result  # pyright: ignore[reportReturnType]
        raise next(error for error in self._gather(self._failure) if error is not None)


@dataclass(frozen=True, slots=True)
class World:
    """A rank of a process group of ``size`` ranks: its rank, its rank on its node, and its device.

    ``store_key``: the prefix of the run's keys in the ranks' store. ``host_collectives``: None for a single rank.
    Tensors are reduced and broadcast on the device. Numbers and objects pass between processors, without waiting for
    the device: an all-reduce of integers under NCCL would drain its queue.
    """

    rank: int
    size: int
    local_rank: int
    launcher: str
    device: torch.device
    store_key: str = ""
    host_collectives: HostCollectives | None = None

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Return on every rank whether the flag is set on any rank."""
        return bool(self.all_reduce_max([int(flag)])[0])

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the maximum over ranks of each number, on every rank."""
        if self.size == 1:
            return list(values)
        return [int(value) for value in self._host.all_reduce(values, max)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor of any shape, on every rank. The argument is not changed."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank. The value must pickle."""
        if self.size == 1:
            return value
        return self._host.broadcast(value)

    def broadcast_tensors_(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's values into the tensors of every rank, in place."""
        if self.size == 1:
            return
        for value in tensors:
            dist.broadcast(value, src=0)

    def all_gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks in rank order, on every rank. The values must pickle."""
        if self.size == 1:
            return [value]
        return self._host.all_gather(value)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0. Return its result, or raise its FovealError, on every rank."""
        return self.broadcast_object(self.run_all_or_raise(lambda: function() if self.rank == 0 else None))  # pyright: ignore[reportReturnType]

    def run_all_or_raise(self, function: Callable[[], T]) -> T:
        """Call a function on every rank and return this rank's result. Raise a FovealError of any rank on all ranks.

        Without this the other ranks would wait for the failed rank in their next collective.
        """
        return self.run_all(function).result_or_raise()

    def run_all(
        self,
        function: Callable[[], T],
        measure: Callable[[T], float] = lambda _: 0.0,
        read_flags: Callable[[], Sequence[bool]] = tuple,
    ) -> RankOutcome[T]:
        """Call a function on every rank. The outcome has its result, or raises a FovealError of any rank on all ranks.

        One collective also sums ``measure`` of each rank's result and unites the flags, which are read when the
        function has returned.
        """
        result: T | None = None
        failure: FovealError | None = None
        number = 0.0
        try:
            result = function()
            number = measure(result)
        except FovealError as error:
            failure = error
        sums = [number, float(failure is not None), *map(float, read_flags())]
        if self.size > 1:
            sums = self._host.all_reduce(sums, sum)
        total, num_failed, *num_set = sums
        return RankOutcome(total, tuple(map(bool, num_set)), bool(num_failed), result, failure, self.all_gather_objects)

    @property
    def _host(self) -> HostCollectives:
        assert self.host_collectives is not None, "init_world connects several ranks"
        return self.host_collectives

    def check_equal_on_ranks(self, facts: Mapping[str, Any]) -> None:
        """Compare named facts of all ranks. Raises: RankConflictError on every rank if they differ."""
        text = json.dumps(facts, sort_keys=True, default=str)
        digests = self.all_gather_objects(hashlib.sha256(text.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        conflicting_rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        texts = self.all_gather_objects(text)
        expected, actual = json.loads(texts[0]), json.loads(texts[conflicting_rank])
        names = [name for name in sorted(expected | actual) if expected.get(name) != actual.get(name)]
        raise RankConflictError(
            f"rank {conflicting_rank} is about another run than rank 0: "
            + "; ".join(f"{name} is {actual.get(name)} there and {expected.get(name)} here" for name in names[:3])
        )


@contextmanager
def init_world(
    collective_timeout_seconds: float,
    identity: RunIdentity | None = None,
    join_timeout_seconds: float = _JOIN_TIMEOUT_SECONDS,
) -> Iterator[World]:
    """Join the process group of a run, and leave it on every way out.

    No collective of any group waits longer than ``collective_timeout_seconds``; the rendezvous waits ``join_timeout_seconds`` for
    missing ranks. Sets the variables that libraries read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so
    that a Slurm step looks to DeepSpeed and Accelerate like torchrun. With a world size of 1 the group is this process,
    with a store in memory.
    Raises: LaunchError if ranks are missing or cannot be reached; TrainingHungError in its place if Slurm restarted the
    job; LaunchError in any case if NCCL refuses the launch or files are too few; RankConflictError if ranks of another
    run, or two on one GPU, came; AttemptSupersededError if this rank is of an earlier attempt.
    """
    raise_open_file_limit()
    launch_env = read_launch_env()
    device = select_device(launch_env)
    identity = identity or RunIdentity.from_launch_env(launch_env)
    world = World(
        launch_env.rank,
        launch_env.world_size,
        launch_env.local_rank,
        launch_env.launcher,
        device,
        identity.store_key,
    )
    enable_flight_recorder()
    if launch_env.world_size == 1:
        store: dist.Store = dist.HashStore()
    else:
        with hung_if_restarted():
            store = join_rendezvous(launch_env, identity, join_timeout_seconds, read_gpu_uuid(device))
    set_rank_env_vars(launch_env, device)
    with _default_timeout(timedelta(seconds=collective_timeout_seconds)):
        _init_process_group(launch_env, device, store)
        try:
            with _connect_hosts(launch_env, store, collective_timeout_seconds) as host_collectives:
                yield replace(world, host_collectives=host_collectives)
        except BaseException as error:
            if describe_peer_failure(error):
                dump_cpu_flight_recorder(launch_env.rank)
            abort_process_group()
            raise
        dist.destroy_process_group()  # without this a clean exit under gloo sometimes aborted


@contextmanager
def _connect_hosts(
    launch_env: LaunchEnv, store: dist.Store, timeout_seconds: float
) -> Iterator[HostCollectives | None]:
    """Connect the ranks' processors, and close the connections on every way out."""
    if launch_env.world_size == 1:
        yield None
        return
    with hung_if_restarted():
        connected = HostCollectives.connect(store, launch_env.rank, launch_env.world_size, timeout_seconds)
    with closing(connected):
        yield connected


@contextmanager
def hung_if_restarted() -> Iterator[None]:
    """Turn a LaunchError into a TrainingHungError in a restarted Slurm job: a node is at fault, a requeue may help."""
    try:
        yield
    except (RankConflictError, FileLimitError):
        raise
    except LaunchError as error:
        if slurm_restart_count():
            raise TrainingHungError(str(error)) from None
        raise


def set_rank_env_vars(launch_env: LaunchEnv, device: torch.device) -> None:
    """Set the variables that libraries read. With several ranks ``open_store`` has set MASTER_ADDR and MASTER_PORT."""
    if launch_env.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    # Libraries use LOCAL_RANK as the device index, which differs from it if each task sees one GPU only.
    local_rank = launch_env.local_rank if device.index is None else device.index
    os.environ |= {
        "RANK": str(launch_env.rank),
        "WORLD_SIZE": str(launch_env.world_size),
        "LOCAL_RANK": str(local_rank),
    }
    if device.type == "cpu":  # without this DeepSpeed, and Accelerate with it, looks for GPUs and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """Set torch's default timeout, which also holds for groups that libraries create without a timeout.

    DeepSpeed reduces gradients in such a group: it would wait 30 minutes under gloo and 10 under NCCL.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def _init_process_group(launch_env: LaunchEnv, device: torch.device, store: dist.Store) -> None:
    """Connect the ranks. Under NCCL the first collective belongs to it, as some connections are made there only."""
    rank, size = launch_env.rank, launch_env.world_size
    if device.type != "cuda" or size == 1:  # NCCL connects a single rank only if a library asks for it
        backend, device_id = "nccl" if device.type == "cuda" else "gloo", None
    else:
        backend, device_id = "nccl", device
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
        if device_id is not None:
            dist.barrier()
    except RuntimeError as error:
        if size == 1:
            raise
        abort_process_group()
        if (mistake := diagnose_launch_mistake(error)) is not None:
            raise mistake from error
        with hung_if_restarted():
            raise LaunchError(
                f"rank {rank} of {size} could not connect to the others over {backend} "
                f"({summarize_collective_error(error)}); "
                f"if another rank stopped, its log says why, else choose the network interface "
                f"(slurm/environment.sh: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
            ) from error


def select_device(launch_env: LaunchEnv) -> torch.device:
    """Return this rank's device. Raises: LaunchError if there are more ranks on the node than visible GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # A task sees either one GPU (--gpus-per-task) or all GPUs of the node: both are common.
    index = launch_env.local_rank if visible > 1 else 0
    if index >= visible:
        raise LaunchError(
            f"local rank {launch_env.local_rank} has no GPU: this process sees {visible}; "
            f"start as many tasks per node as GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def describe_rank(world: World) -> str:
    """Return a line with rank, host, device, launcher and Slurm job, for the head of each rank's log."""
    slurm = describe_slurm_task()
    return (
        f"rank {world.rank} of {world.size} on {socket.gethostname()}, local rank {world.local_rank}, {world.device}, "
        f"launcher {world.launcher}{', ' + slurm if slurm else ''}"
    )
