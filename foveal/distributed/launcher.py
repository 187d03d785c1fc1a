"""Rank, world size, local rank and rendezvous addresses, read from the launcher's environment variables.

launcher       variables                                      rendezvous store
torchrun       RANK, WORLD_SIZE and TORCHELASTIC_RUN_ID       torchrun's agent at MASTER_ADDR:MASTER_PORT
accelerate     as torchrun, which it starts                   as torchrun
srun           SLURM_PROCID, SLURM_STEP_NUM_TASKS             rank 0, on a free port of its node
mpirun         OMPI_COMM_WORLD_RANK, PMI_RANK and the like    rank 0; at MASTER_ADDR if the job has several nodes
deepspeed      RANK, WORLD_SIZE and CROSS_RANK                rank 0 at MASTER_ADDR:MASTER_PORT
foveal         RANK, WORLD_SIZE and FOVEAL_LAUNCHER           rank 0, on a free port of this machine
environment    RANK, WORLD_SIZE, set by hand                  rank 0 at MASTER_ADDR:MASTER_PORT
"""

import hashlib
import os
from dataclasses import dataclass

from foveal.distributed.launcher_process import LAUNCHER_ENV_VAR
from foveal.errors import LaunchError
from foveal.slurm import is_child_of_srun, rank0_slurm_node, read_env_int, read_slurm_launch_id, read_slurm_task

_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # set by torchrun only
_LAUNCHER_BY_VARIABLE = {
    _TORCHRUN_VARIABLE: "torchrun",
    "CROSS_RANK": "deepspeed",  # set by deepspeed only
    LAUNCHER_ENV_VAR: "foveal",  # by foveal/distributed/local_launch.py
}
# Of each MPI launcher the variables for rank, size, local rank and ranks on this node.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_MPI_JOB_VARIABLES = ("PMIX_NAMESPACE", "PMI_JOBID")
_FIRST_PORT = 20000
_PORT_COUNT = 12000  # ends below 32768, where Linux's ports for outgoing connections begin
_CANDIDATE_PORTS = 16  # ports that rank 0 tries to bind and the other ranks try to connect to


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """A process's place in the launch: rank, world size, rank on its node, and the launcher's name."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str


def read_launch_env() -> LaunchEnv:
    """Return the rank and world size stated by torchrun, accelerate, deepspeed or foveal, else by a Slurm step, mpirun or RANK.

    Without any of them the world size is 1. A batch script outside ``srun`` has SLURM_PROCID and SLURM_NTASKS but no
    SLURM_STEP_ID: its world size is 1 too.
    Raises: LaunchError if the variables contradict one another.
    """
    torch_env = _read_torch_env()
    if torch_env is not None and torch_env.launcher != "environment" and not is_child_of_srun():
        return _check_ranks(torch_env)
    claims = [claim for claim in (_read_slurm_env(), _read_mpi_env(), torch_env) if claim is not None]
    for claim in claims[1:]:
        if (claim.rank, claim.world_size) != (claims[0].rank, claims[0].world_size):
            raise LaunchError(
                f"{claims[0].launcher} says rank {claims[0].rank} of {claims[0].world_size}, "
                f"and the environment {_format_variables(claim)}: "
                f"unset what a shell or an earlier launcher has left there, or let torchrun start the ranks"
            )
    return _check_ranks(claims[0]) if claims else LaunchEnv(0, 1, 0, "none")


def _read_torch_env() -> LaunchEnv | None:
    """Read RANK and WORLD_SIZE, and tell torchrun, deepspeed, foveal and a user's shell apart."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    launcher = next((name for variable, name in _LAUNCHER_BY_VARIABLE.items() if variable in os.environ), "environment")
    return LaunchEnv(read_env_int("RANK"), read_env_int("WORLD_SIZE"), read_env_int("LOCAL_RANK", "0"), launcher)


def _read_slurm_env() -> LaunchEnv | None:
    task = read_slurm_task()
    return None if task is None else LaunchEnv(task.rank, task.world_size, task.local_rank, "srun")


def _read_mpi_env() -> LaunchEnv | None:
    for rank, size, local_rank, _ in _MPI_VARIABLES:
        if rank in os.environ and size in os.environ:
            return LaunchEnv(read_env_int(rank), read_env_int(size), read_env_int(local_rank, "0"), "mpirun")
    return None


def _format_variables(claim: LaunchEnv) -> str:
    """Return the variables of a claim as ``RANK=0 and WORLD_SIZE=1``."""
    if claim.launcher == "mpirun":
        names = next(names[:2] for names in _MPI_VARIABLES if names[0] in os.environ)
    else:
        names = ("RANK", "WORLD_SIZE")
    return " and ".join(f"{name}={os.environ[name]}" for name in names)


def _check_ranks(claim: LaunchEnv) -> LaunchEnv:
    if not 0 <= claim.local_rank <= claim.rank < claim.world_size:
        raise LaunchError(
            f"{claim.launcher} says rank {claim.rank} (local rank {claim.local_rank}) of {claim.world_size}, "
            f"which cannot be; unset what an earlier launcher left in the environment"
        )
    return claim


def read_launch_id(launch_env: LaunchEnv) -> dict[str, str]:
    """Return the launcher's own identifiers of this launch: equal on all its ranks, different for another launch."""
    if launch_env.launcher == "srun":
        return read_slurm_launch_id()
    if launch_env.launcher == "torchrun":
        return {
            "torchrun": os.environ[_TORCHRUN_VARIABLE],
            "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        }
    if launch_env.launcher == "foveal":
        return {"foveal": os.environ[LAUNCHER_ENV_VAR]}
    if launch_env.launcher == "mpirun":
        job = next((os.environ[name] for name in _MPI_JOB_VARIABLES if name in os.environ), "")
        return {"mpirun": job or (str(os.getppid()) if _is_single_node(launch_env) else "")}
    return {"launcher": launch_env.launcher}


def torchrun_agent_serves_store() -> bool:
    """Whether torchrun's agent serves the store, so that rank 0 is a client."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def candidate_store_addresses(launch_env: LaunchEnv) -> list[tuple[str, int]]:
    """Return the (host, port) pairs at which rank 0 may serve the store, in the order of its tries; equal on all ranks.

    MASTER_ADDR and MASTER_PORT come first. If the launcher states rank 0's node, ports derived from the launch follow,
    so that stale variables of a shell and ports in use are passed over.
    Raises: LaunchError if neither the variables nor the launcher state rank 0's address.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    candidates = _candidate_ports(read_launch_id(launch_env))
    addresses: list[tuple[str, int]] = []
    if host and port.isdigit():
        addresses.append((host, int(port)))
    elif host and launch_env.launcher in ("srun", "mpirun"):
        addresses += [(host, candidate) for candidate in candidates]
    rank0_node = _rank0_node(launch_env)
    if rank0_node:
        if port.isdigit() and not host:
            addresses.append((rank0_node, int(port)))
        addresses += [(rank0_node, candidate) for candidate in candidates]
    if not addresses:
        raise LaunchError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}: set them to the node of rank 0 and a port that is "
            f"free there, or start with torchrun or srun"
        )
    return list(dict.fromkeys(addresses))


def _rank0_node(launch_env: LaunchEnv) -> str | None:
    """Return the node of rank 0; None if the launcher does not state it."""
    if launch_env.launcher == "srun":
        return rank0_slurm_node()
    is_here = launch_env.launcher == "foveal" or (launch_env.launcher == "mpirun" and _is_single_node(launch_env))
    return "127.0.0.1" if is_here else None


def _is_single_node(launch_env: LaunchEnv) -> bool:
    return any(
        os.environ.get(names[3]) == str(launch_env.world_size) for names in _MPI_VARIABLES if names[0] in os.environ
    )


def _candidate_ports(launch_id: dict[str, str]) -> list[int]:
    """Return ports from a hash of the launch (job, step, restart): two launches on one node seldom share a port."""
    digest = hashlib.shake_256(repr(sorted(launch_id.items())).encode()).digest(8 * _CANDIDATE_PORTS)
    drawn = (int.from_bytes(digest[at : at + 2]) % _PORT_COUNT for at in range(0, len(digest), 2))
    return [_FIRST_PORT + port for port in list(dict.fromkeys(drawn))[:_CANDIDATE_PORTS]]
