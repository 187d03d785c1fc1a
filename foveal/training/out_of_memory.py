"""Out-of-memory errors: their recognition, and a message with the settings that lower memory use."""

import errno
import re

import torch

from foveal.distributed.launcher import read_launch_env
from foveal.distributed.peer_failure import iter_exception_chain
from foveal.errors import FovealError, OutOfMemoryError
from foveal.training.plan import Plan

# From torch's host allocator, from GPU libraries, and from NCCL, whose errors resemble those of a lost peer.
_MEMORY_ERROR = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_CPP_SOURCE_PREFIX = re.compile(r"^\[[^]]*\][\s.]*")  # the C++ source line that torch may put first


def diagnose_out_of_memory(error: BaseException, stage: str, plan: Plan | None = None) -> OutOfMemoryError | None:
    """Return an OutOfMemoryError if this process ran out of GPU or host memory; None for any other error.

    ``plan``: the run's plan if it exists already; it gives the microbatch size and the settings that can still be
    lowered.
    """
    if isinstance(error, FovealError):
        return None
    cause = next((link for link in iter_exception_chain(error) if _is_memory_error(link)), None)
    if cause is None:
        return None
    lines = _CPP_SOURCE_PREFIX.sub("", str(cause).strip()).splitlines() or [type(cause).__name__]
    detail = lines[0].partition(". ")[0].rstrip(".")
    is_host = not isinstance(cause, torch.OutOfMemoryError) and "CUDA" not in str(cause)
    summary = f"{stage} ran out of memory{' of the host' if is_host else ''} on rank {read_launch_env().rank}"
    if plan is None:
        return OutOfMemoryError(f"{summary} before its first step ({detail})")
    return OutOfMemoryError(
        f"{summary}, with {plan.microbatch_size} images per forward ({detail}): {_suggest_remedies(plan)}; none of it "
        f"changes the curve beyond rounding"
    )


def _is_memory_error(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MEMORY_ERROR.search(str(error)) is not None


def _suggest_remedies(plan: Plan) -> str:
    """Return the settings that lower memory use, except those at their limit."""
    engine, remedies = plan.cfg.engine, []
    if plan.microbatch_size > 1:
        remedies.append(f"lower batch.max_micro_size ({plan.microbatch_size})")
    if not engine.activation_checkpointing:
        remedies.append("set engine.activation_checkpointing=true")
    if "deepspeed" in (engine.kind, engine.sharding) and engine.zero < 3:
        remedies.append(f"raise engine.zero ({engine.zero})")
    elif engine.kind == "accelerate" and engine.sharding == "ddp":
        remedies.append("set engine.sharding=fsdp2")
    return ", or ".join(remedies) or "take a smaller model or larger GPUs"
