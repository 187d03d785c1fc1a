"""Who else is there: the ranks of one run, joined into a group."""

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

from foveal.distributed.launcher import LaunchEnv, read_int_env, read_launch_env
from foveal.distributed.peer_failure import (
    abort_process_group,
    describe_peer_failure,
    dump_flight_recorder,
    enable_flight_recorder,
)
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.errors import FovealError, LaunchError, RankConflictError, TrainingHungError

T = TypeVar("T")
_JOIN_TIMEOUT_SECONDS = 600.0  # seconds that the ranks have to come together: imports from a cold disk take minutes


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``: its rank in all, its rank on its node, and its device.

    ``key`` is that of the run in the ranks' store.
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
        """True on every rank if the flag is set on any."""
        return bool(self.all_reduce_max([int(flag)])[0])

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest over ranks of each number, on every rank: what ranks agree on in one collective of a few bytes.

        The loop spends two of these a step: one before it takes a batch (``together``), one after the update.
        """
        if self.size == 1:
            return list(values)
        words = torch.tensor(list(values), device=self.device)
        dist.all_reduce(words, op=dist.ReduceOp.MAX)
        return words.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor of any shape, on every rank; the argument is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value (anything that pickles), on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_tensors_(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's values into these tensors of any type, on every rank."""
        if self.size == 1:
            return
        for value in tensors:
            dist.broadcast(value, src=0)

    def all_gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, function: Callable[[], T]) -> T:
        """What ``take`` returns on rank 0, which alone calls it, on every rank; its mistake is everybody's."""
        return self.broadcast_object(self.run_all_or_raise(lambda: function() if self.rank == 0 else None))  # pyright: ignore[reportReturnType]

    def run_all_or_raise(self, function: Callable[[], T]) -> T:
        """What ``take`` returns on this rank; a user's mistake on any rank is raised on all of them.

        Otherwise the rank that fails would leave the others waiting in their next collective.
        """
        try:
            taken, mistake = function(), None
        except FovealError as error:
            taken, mistake = None, error
        if not self.any_rank(mistake is not None):
            return taken  # pyright: ignore[reportReturnType]
        raise next(each for each in self.all_gather_objects(mistake) if each is not None)

    def check_equal_on_ranks(self, facts: Mapping[str, Any]) -> None:
        """Compare plain facts by name over all ranks. Raises: RankConflict, on every rank, where they are not the same."""
        text = json.dumps(facts, sort_keys=True, default=str)
        digests = self.all_gather_objects(hashlib.sha256(text.encode()).hexdigest())
        if len(set(digests)) == 1:
            return
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        texts = self.all_gather_objects(text)
        first, unlike = json.loads(texts[0]), json.loads(texts[other])
        names = [name for name in sorted(first | unlike) if first.get(name) != unlike.get(name)]
        raise RankConflictError(
            f"rank {other} is about another run than rank 0: "
            + "; ".join(f"{name} is {unlike.get(name)} there and {first.get(name)} here" for name in names[:3])
        )


@contextmanager
def init_world(
    timeout_seconds: float, identity: RunIdentity | None = None, join_timeout_seconds: float = _JOIN_TIMEOUT_SECONDS
) -> Iterator[World]:
    """Join the other ranks of a run, and leave them properly on every way out.

    No collective of any group waits longer than ``timeout_seconds``, nor anybody longer than ``joining_seconds`` for a
    rank that does not come. The variables that libraries read (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    are set for them, so that a Slurm step looks to DeepSpeed and Accelerate like torchrun. Alone, the group is this
    process, in memory.
    Raises: LaunchError where the ranks do not come together, RankConflict where others came, Superseded where a later
    attempt did; Hung in place of a LaunchError in a job that was started before.
    """
    here = read_launch_env()
    device = select_device(here)
    identity = identity or RunIdentity.from_launch_env(here)
    world = World(here.rank, here.world_size, here.local_rank, here.launcher, device, identity.store_key)
    enable_flight_recorder()
    if here.world_size == 1:
        store: dist.Store = dist.HashStore()
    else:
        with _hung_if_restarted():
            store = join_rendezvous(here, identity, join_timeout_seconds)
    set_rank_env_vars(here, device)
    with _default_timeout(timedelta(seconds=timeout_seconds)):
        _init_process_group("nccl" if device.type == "cuda" else "gloo", here, store)
        try:
            yield world
        except BaseException as error:
            if describe_peer_failure(error):
                dump_flight_recorder(here.rank)
            abort_process_group()
            raise
        dist.destroy_process_group()  # without it a clean exit under gloo sometimes aborted


@contextmanager
def _hung_if_restarted() -> Iterator[None]:
    """In a job that Slurm has started before, ranks that do not come are a node's fault, and another start may help."""
    try:
        yield
    except RankConflictError:
        raise
    except LaunchError as error:
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
            raise TrainingHungError(str(error)) from None
        raise


def set_rank_env_vars(launch_env: LaunchEnv, device: torch.device) -> None:
    """Set what libraries read; of several ranks, ``meet`` has set where."""
    if launch_env.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
    # Libraries take LOCAL_RANK for the number of the device, which it is not where each task sees one GPU only.
    local = launch_env.local_rank if device.index is None else device.index
    os.environ |= {"RANK": str(launch_env.rank), "WORLD_SIZE": str(launch_env.world_size), "LOCAL_RANK": str(local)}
    if device.type == "cpu":
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed, and Accelerate with it, looks for GPUs and warns


@contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """torch's timeout for every group, also for those that libraries make for themselves without naming one.

    DeepSpeed reduces gradients in such a group: it would wait 30 minutes under gloo and 10 under NCCL, whatever was set.
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
            f"rank {launch_env.rank} of {launch_env.world_size} could not connect to the others over {backend} ({str(error).splitlines()[0]}); "
            f"if another rank stopped, its log says why, else choose the network interface "
            f"(slurm/environment.sh: NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        ) from error


def select_device(launch_env: LaunchEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    # One visible GPU for each task (--gpus-per-task) or all of the node's for every task: both are common.
    index = launch_env.local_rank if seen > 1 else 0
    if index >= seen:
        raise LaunchError(
            f"local rank {launch_env.local_rank} has no GPU: this process sees {seen}; start as many tasks per node as GPUs"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def describe_rank(world: World) -> str:
    """One line for the head of each rank's log."""
    slurm = ", ".join(
        f"{name}={os.environ[name]}"
        for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_RESTART_COUNT")
        if name in os.environ
    )
    return (
        f"rank {world.rank} of {world.size} on {socket.gethostname()}, local rank {world.local_rank}, {world.device}, "
        f"launcher {world.launcher}{', ' + slurm if slurm else ''}"
    )


def slurm_job_id() -> str | None:
    """What Slurm's commands call this job; nothing outside Slurm.

    SLURM_JOB_ID alone would not do for a task of an array: one of the tasks has the number of the array itself, and
    ``scontrol requeue`` of that starts every task again.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True, slots=True)
class SlurmArrayTask:
    """A task of a Slurm array: its number, how many tasks there are, and the lowest and the highest number."""

    task_id: int
    task_count: int
    min_task_id: int
    max_task_id: int


def read_slurm_array_task() -> SlurmArrayTask | None:
    """The task of a Slurm array that this process belongs to, if it does."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return None
    return SlurmArrayTask(*(read_int_env(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "MAX")))


def slurm_job_tags() -> dict[str, str]:
    """What Slurm says of this job, for the tracker's tags; empty outside Slurm."""
    names = (
        "SLURM_JOB_NAME",
        "SLURM_JOB_NODELIST",
        "SLURM_RESTART_COUNT",
        "SLURM_NTASKS",
        "SLURM_CLUSTER_NAME",
    )
    job = slurm_job_id()
    named = {} if job is None else {"slurm_job_id": job}
    return named | {name.lower(): os.environ[name] for name in names if name in os.environ}
