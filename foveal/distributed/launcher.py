"""Who this process is, as its launcher says it: rank, size, local rank, and the places where the ranks may meet.

launcher       variables                                      rendezvous
torchrun       RANK, WORLD_SIZE and TORCHELASTIC_RUN_ID       a store of its agent at MASTER_ADDR:MASTER_PORT
accelerate     the same: it starts torchrun
srun           SLURM_PROCID, SLURM_STEP_NUM_TASKS             rank 0 serves on a free port of its node
mpirun         OMPI_COMM_WORLD_RANK, PMI_RANK and the like    rank 0 serves; on several nodes at MASTER_ADDR
deepspeed      RANK, WORLD_SIZE and CROSS_RANK                rank 0 serves at MASTER_ADDR:MASTER_PORT
environment    RANK, WORLD_SIZE, set by hand                  rank 0 serves at MASTER_ADDR:MASTER_PORT
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from foveal.errors import LaunchError

_ELASTIC, _DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_RANK"  # variables that torchrun and deepspeed alone set
# MPI's launchers: rank, size, local rank, ranks on this node.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_MPI_JOB = ("PMIX_NAMESPACE", "PMI_JOBID")
_FIRST_PORT, _PORTS = 20000, 12000  # below the range that Linux gives to outgoing connections
_TRIES = 16  # ports that rank 0 tries, and the others look at


@dataclass(frozen=True, slots=True)
class LaunchEnv:
    """What the launcher says, before anything is started."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str


def read_launch_env() -> LaunchEnv:
    """Rank and size from torchrun or accelerate, else from a Slurm step, mpirun or the environment, else alone.

    A batch script outside ``srun`` sees SLURM_PROCID and SLURM_NTASKS too, but no SLURM_STEP_ID: it is alone.
    Raises: LaunchError where a launcher's variables contradict one another, or those of another launcher.
    """
    stated = _read_torch_env()
    if stated is not None and stated.launcher != "environment" and not _child_of_slurmstepd():
        return _check_ranks(stated)
    claims = [claim for claim in (_read_slurm_env(), _read_mpi_env(), stated) if claim is not None]
    for claim in claims[1:]:
        if (claim.rank, claim.world_size) != (claims[0].rank, claims[0].world_size):
            raise LaunchError(
                f"{claims[0].launcher} says rank {claims[0].rank} of {claims[0].world_size}, and the environment {_format_variables(claim)}: "
                f"unset what a shell or an earlier launcher has left there, or let torchrun start the ranks"
            )
    return _check_ranks(claims[0]) if claims else LaunchEnv(0, 1, 0, "none")


def _read_torch_env() -> LaunchEnv | None:
    """RANK and WORLD_SIZE, and who has set them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    launcher = "torchrun" if _ELASTIC in os.environ else "deepspeed" if _DEEPSPEED in os.environ else "environment"
    return LaunchEnv(read_int_env("RANK"), read_int_env("WORLD_SIZE"), read_int_env("LOCAL_RANK", "0"), launcher)


def _read_slurm_env() -> LaunchEnv | None:
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return None
    size = read_int_env("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    return LaunchEnv(read_int_env("SLURM_PROCID"), size, read_int_env("SLURM_LOCALID", "0"), "srun")


def _read_mpi_env() -> LaunchEnv | None:
    for rank, size, local, _ in _MPI:
        if rank in os.environ and size in os.environ:
            return LaunchEnv(read_int_env(rank), read_int_env(size), read_int_env(local, "0"), "mpirun")
    return None


def _format_variables(claim: LaunchEnv) -> str:
    """A claim in the words of its variables."""
    if claim.launcher == "mpirun":
        names = next(names[:2] for names in _MPI if names[0] in os.environ)
    else:
        names = ("RANK", "WORLD_SIZE")
    return " and ".join(f"{name}={os.environ[name]}" for name in names)


def _check_ranks(claim: LaunchEnv) -> LaunchEnv:
    if not 0 <= claim.local_rank <= claim.rank < claim.world_size:
        raise LaunchError(
            f"{claim.launcher} says rank {claim.rank} (local rank {claim.local_rank}) of {claim.world_size}, which cannot be; "
            f"unset what an earlier launcher left in the environment"
        )
    return claim


def _child_of_slurmstepd() -> bool:
    """Whether srun itself started this process: what torchrun left in the environment is then an earlier torchrun's."""
    if "SLURM_STEP_ID" not in os.environ:
        return False
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "slurmstepd"
    except OSError:
        return False


def read_int_env(name: str, default: str | None = None) -> int:
    """The number in a launcher's variable. Raises: LaunchError."""
    text = os.environ.get(name, default)
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"the launcher's {name} is {text!r}, which is not a number") from None


def read_launch_id(launch_env: LaunchEnv) -> dict[str, str]:
    """What tells this start of ranks from any other: the same on all its ranks, by the launcher's own numbers."""
    if launch_env.launcher == "srun":
        names = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID", "restart": "SLURM_RESTART_COUNT"}
        return {what: os.environ.get(name, "0") for what, name in names.items()}
    if launch_env.launcher == "torchrun":
        return {"torchrun": os.environ[_ELASTIC], "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}
    if launch_env.launcher == "mpirun":
        job = next((os.environ[name] for name in _MPI_JOB if name in os.environ), "")
        return {"mpirun": job or (str(os.getppid()) if _is_single_node(launch_env) else "")}
    return {"launcher": launch_env.launcher}


def is_store_in_agent() -> bool:
    """Whether torchrun's agent serves the store, and rank 0 is a client like the others."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rendezvous_addresses(launch_env: LaunchEnv) -> list[tuple[str, int]]:
    """Where the ranks may meet, host and port, in the order in which rank 0 tries them: the same on every rank.

    MASTER_ADDR and MASTER_PORT come first. Behind them, where the launcher tells of rank 0's node, come ports that are
    drawn by the launch: whatever a shell has left in the environment, or already listens somewhere, is passed over.
    Raises: LaunchError where nothing says where rank 0 is.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    drawn = _candidate_ports(read_launch_id(launch_env))
    found: list[tuple[str, int]] = []
    if host and (port.isdigit() or launch_env.launcher in ("srun", "mpirun")):
        found += [(host, int(port))] if port.isdigit() else [(host, each) for each in drawn]
    first = _rank0_node(launch_env)
    if first:
        found += [(first, int(port))] if port.isdigit() and not host else []
        found += [(first, each) for each in drawn]
    if not found:
        raise LaunchError(
            f"MASTER_ADDR is {host!r} and MASTER_PORT is {port!r}: set them to the node of rank 0 and a port that is free "
            f"there, or start with torchrun or srun"
        )
    return list(dict.fromkeys(found))


def _rank0_node(launch_env: LaunchEnv) -> str | None:
    """The node of rank 0, where the launcher says it."""
    if launch_env.launcher == "srun":
        return first_node_of_list(os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"])
    return "127.0.0.1" if launch_env.launcher == "mpirun" and _is_single_node(launch_env) else None


def _is_single_node(launch_env: LaunchEnv) -> bool:
    return any(os.environ.get(names[3]) == str(launch_env.world_size) for names in _MPI if names[0] in os.environ)


def first_node_of_list(node_list: str) -> str:
    """The first host of a Slurm node list: ``a[01-03,7]b,c`` gives ``a01b``; scontrol is not in every container."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    assert found is not None, "the pattern matches every string"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def _candidate_ports(launch_id: dict[str, str]) -> list[int]:
    """Ports that two launches on one node seldom share: by job, step and restart, never by the job alone."""
    digest = hashlib.sha256(repr(sorted(launch_id.items())).encode()).digest()
    return [_FIRST_PORT + int.from_bytes(digest[at : at + 2]) % _PORTS for at in range(0, 2 * _TRIES, 2)]
