"""The process group: ranks of one run and their collectives."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from foveal.distributed.launcher import LaunchEnv, read_launch_env
from foveal.distributed.peer_failure import (
    abort_process_group,
    describe_peer_failure,
    dump_cpu_flight_recorder,
    enable_flight_recorder,
)
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import FovealError, LaunchError, RankConflictError, TrainingHungError
from foveal.slurm import describe_slurm_task, slurm_restart_count

T = TypeVar("T")
_JOIN_TIMEOUT_SECONDS = 600.0  # for all ranks to join: imports from a cold disk take minutes


@dataclass(frozen=True, slots=True)
class World:
    """A rank of a process group of ``size`` ranks: its rank, its rank on its node, and its device.

    ``store_key``: the prefix of the run's keys in the ranks' store.
    """

    rank: int
    size: int
    local_rank: int
    launcher: str
    device: torch.device
    store_key: str = ""

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def any_rank(self, flag: bool) -> bool:
        """Return on every rank whether the flag is set on any rank."""
        return bool(self.all_reduce_max([int(flag)])[0])

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Return the maximum over ranks of each number, on every rank: one collective of a few bytes.

        The loop runs two of these per step: one for the batch (``run_all_and_any``), one after the update.
        """
        if self.size == 1:
            return list(values)
        maxima = torch.tensor(list(values), device=self.device)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return maxima.tolist()

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
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

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
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0. Return its result, or raise its FovealError, on every rank."""
        return self.broadcast_object(self.run_all_or_raise(lambda: function() if self.rank == 0 else None))  # pyright: ignore[reportReturnType]

    def run_all_or_raise(self, function: Callable[[], T]) -> T:
        """Call a function on every rank and return this rank's result. Raise a FovealError of any rank on all ranks.

        Without this the other ranks would wait for the failed rank in their next collective.
        """
        return self.run_all_and_any(function, lambda _: False)[0]

    def run_all_and_any(self, function: Callable[[], T], predicate: Callable[[T], bool]) -> tuple[T, bool]:
        """Do as ``run_all_or_raise``; also return whether the predicate holds for any rank's result.

        One collective, the same as without a predicate.
        """
        result: T | None = None
        failure: FovealError | None = None
        holds = False
        try:
            result = function()
            holds = predicate(result)
        except FovealError as error:
            failure = error
        any_failed, any_holds = self.all_reduce_max([int(failure is not None), int(holds)])
        if not any_failed:
            return result, bool(any_holds)  # pyright: ignore[reportReturnType]
        raise next(error for error in self.all_gather_objects(failure) if error is not None)

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
    Raises: LaunchError if ranks are missing; TrainingHungError in its place if Slurm restarted the job;
    RankConflictError if ranks of another run came; AttemptSupersededError if this rank is of an earlier attempt.
    """
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
        with _hung_if_restarted():
            store = join_rendezvous(launch_env, identity, join_timeout_seconds)
    set_rank_env_vars(launch_env, device)
    with _default_timeout(timedelta(seconds=collective_timeout_seconds)):
        _init_process_group("nccl" if device.type == "cuda" else "gloo", launch_env, store)
        try:
            yield world
        except BaseException as error:
            if describe_peer_failure(error):
                dump_cpu_flight_recorder(launch_env.rank)
            abort_process_group()
            raise
        dist.destroy_process_group()  # without this a clean exit under gloo sometimes aborted


@contextmanager
def _hung_if_restarted() -> Iterator[None]:
    """Turn a LaunchError into a TrainingHungError in a restarted Slurm job: a node is at fault, a requeue may help."""
    try:
        yield
    except RankConflictError:
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


def _init_process_group(backend: str, launch_env: LaunchEnv, store: dist.Store) -> None:
    try:
        dist.init_process_group(backend, store=store, rank=launch_env.rank, world_size=launch_env.world_size)
    except RuntimeError as error:
        if launch_env.world_size == 1:
            raise
        raise LaunchError(
            f"rank {launch_env.rank} of {launch_env.world_size} could not connect to the others over {backend} "
            f"({str(error).splitlines()[0]}); "
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
