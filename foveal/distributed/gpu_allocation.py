"""The GPUs that Slurm gave a node, those that torch sees, and the ranks that are there to use them."""

import os

import torch

from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preflight import current_node_name, node_names_by_rank
from foveal.errors import BadNodeError, LaunchError


def check_slurm_gpus(launch_env: LaunchEnv) -> str | None:
    """Compare the GPUs of this step of Slurm on this node with torch's and with the ranks; a sentence about idle ones.

    Nothing outside a step of Slurm, or where it gave no GPUs. Raises: BadNode where torch sees fewer GPUs than this rank
    has, LaunchError where ranks would have to share one.
    """
    given = _count_allocated_gpus()
    if not given:
        return None
    node, visible = current_node_name(), _read_gpu_list("CUDA_VISIBLE_DEVICES")
    expected = given if visible is None else len(visible)  # of --gpus-per-task a rank is shown its own
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise BadNodeError(
            f"Slurm gave {_format_gpu_count(given)}, torch sees none on {node}: {_explain_missing_gpus()}"
        )
    if there < expected:
        raise BadNodeError(
            f"Slurm gave this rank {_format_gpu_count(expected)}, torch sees {there} on {node}: what does nvidia-smi say there?"
        )
    ranks = _count_local_ranks(launch_env)
    if ranks > given:
        raise LaunchError(
            f"{ranks} ranks share {_format_gpu_count(given)} on {node}: start one a GPU, --ntasks-per-node={given}"
        )
    if 0 < ranks < given:
        return (
            f"{given - ranks} of {_format_gpu_count(given)} on {node} have no rank: --ntasks-per-node={given} uses all"
        )
    return None


def _count_allocated_gpus() -> int:
    """How many GPUs of this node belong to the step that this process is in."""
    if "SLURM_STEP_ID" not in os.environ:
        return 0
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")  # of the whole step, also where every task has its own
    return (
        int(count)
        if count.isdecimal()
        else len(_read_gpu_list("SLURM_STEP_GPUS") or _read_gpu_list("SLURM_JOB_GPUS") or [])
    )


def _read_gpu_list(name: str) -> list[str] | None:
    """The GPUs that a variable lists; nothing where it is not set."""
    text = os.environ.get(name)
    return None if text is None else [each for each in text.split(",") if each.strip() not in {"", "-1", "NoDevFiles"}]


def _count_local_ranks(launch_env: LaunchEnv) -> int:
    """The ranks on this node; 0 if nobody knows."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's
    return int(local) if local.isdecimal() else node_names_by_rank(launch_env.world_size).count(current_node_name())


def _explain_missing_gpus() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU; install one for GPUs, or ask for --gpus-per-node=0"
    if _read_gpu_list("CUDA_VISIBLE_DEVICES") == []:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides them"
    return (
        f"the driver does not fit torch {torch.__version__}, a container was started without its GPUs, or they are lost"
    )


def _format_gpu_count(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"
