"""Compare the GPUs that Slurm allocated on this node with the GPUs that torch sees and with the ranks on the node."""

import os

import torch

from foveal.distributed.launcher import LaunchEnv
from foveal.errors import BadNodeError, LaunchError
from foveal.slurm import count_allocated_gpus, current_node_name, read_gpu_list, slurm_nodes_by_rank


def check_slurm_gpus(launch_env: LaunchEnv) -> str | None:
    """Check the GPUs that this Slurm step has on this node. Return a sentence about idle GPUs.

    None if all GPUs are in use, outside a Slurm step, and if Slurm allocated no GPUs.
    Raises: BadNodeError if torch sees fewer GPUs than this rank was given; LaunchError if ranks would share a GPU.
    """
    allocated = count_allocated_gpus()
    if not allocated:
        return None
    node, visible = current_node_name(), read_gpu_list("CUDA_VISIBLE_DEVICES")
    expected = allocated if visible is None else len(visible)  # with --gpus-per-task a rank sees only its own GPUs
    detected = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not detected:
        raise BadNodeError(
            f"Slurm gave {_format_gpu_count(allocated)}, torch sees none on {node}: {_explain_missing_gpus()}"
        )
    if detected < expected:
        raise BadNodeError(
            f"Slurm gave this rank {_format_gpu_count(expected)}, torch sees {detected} on {node}: "
            f"run nvidia-smi on that node"
        )
    ranks = _count_local_ranks(launch_env)
    if ranks > allocated:
        raise LaunchError(
            f"{ranks} ranks share {_format_gpu_count(allocated)} on {node}: start one rank per GPU, "
            f"--ntasks-per-node={allocated}"
        )
    if 0 < ranks < allocated:
        return (
            f"{allocated - ranks} of {_format_gpu_count(allocated)} on {node} have no rank: "
            f"--ntasks-per-node={allocated} uses all"
        )
    return None


def find_hidden_gpus(launch_env: LaunchEnv) -> str | None:
    """Return a sentence if the ranks of this node see fewer GPUs than the Slurm step has there; None otherwise."""
    allocated, ranks = count_allocated_gpus(), _count_local_ranks(launch_env)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if ranks < 2 or not 0 < visible < allocated:
        return None
    return (
        f"each rank sees {visible} of the {_format_gpu_count(allocated)} of {current_node_name()} (--gpus-per-task, or a "
        f"binding of its own): NCCL may copy through host memory instead of NVLink; ask for --gpus-per-node={allocated}"
    )


def read_gpu_uuid(device: torch.device) -> str:
    """Return what tells a GPU, or a MIG slice of one, from all others of its node. Empty if nothing does, and on a CPU.

    Empty too where NCCL is told that ranks share a GPU (NCCL_MULTI_RANK_GPU_ENABLE=1).
    """
    if device.type != "cuda" or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return ""
    visible = read_gpu_list("CUDA_VISIBLE_DEVICES") or []
    name = visible[device.index] if device.index < len(visible) else ""
    return name if name.startswith("MIG-") else str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def _count_local_ranks(launch_env: LaunchEnv) -> int:
    """Return the number of ranks on this node; 0 if the launcher does not state it."""
    local_size = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
    if local_size.isdecimal():
        return int(local_size)
    return slurm_nodes_by_rank(launch_env.world_size).count(current_node_name())


def _explain_missing_gpus() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU; install one for GPUs, or ask for --gpus-per-node=0"
    if read_gpu_list("CUDA_VISIBLE_DEVICES") == []:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides them"
    return (
        f"the driver does not fit torch {torch.__version__}, a container was started without its GPUs, or they are lost"
    )


def _format_gpu_count(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"
