"""Memory that did not suffice: how the error is recognised, and what is said of it."""

import errno
import re

import torch

from foveal.distributed.launcher import read_launch_env
from foveal.distributed.peer_failure import iter_exception_chain
from foveal.errors import FovealError, OutOfMemoryError
from foveal.training.plan import Plan

# Of torch's allocator on the host, of libraries on a GPU, and of NCCL, whose errors look like those of a lost peer.
_WORDS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|std::bad_alloc|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_SOURCE = re.compile(r"^\[[^]]*\][\s.]*")  # the line of C++ that torch may begin with


def diagnose_out_of_memory(error: BaseException, stage: str, plan: Plan | None = None) -> OutOfMemoryError | None:
    """The sentence where this process ran out of memory, of a GPU or of its own; nothing for any other error.

    ``plan`` is that of the run, where there is one already: it says how many images a forward holds, and what is left to
    be lowered.
    """
    if isinstance(error, FovealError):
        return None
    cause = next((each for each in iter_exception_chain(error) if _is_memory_error(each)), None)
    if cause is None:
        return None
    words = _SOURCE.sub("", str(cause).strip()).splitlines() or [type(cause).__name__]
    what = words[0].partition(". ")[0].rstrip(".")
    host = not isinstance(cause, torch.OutOfMemoryError) and "CUDA" not in str(cause)
    where = f"{stage} ran out of memory{' of the host' if host else ''} on rank {read_launch_env().rank}"
    if plan is None:
        return OutOfMemoryError(f"{where} before its first step ({what})")
    return OutOfMemoryError(
        f"{where}, with {plan.microbatch_size} images per forward ({what}): {_suggest_remedies(plan)}; none of it changes the curve beyond "
        f"rounding"
    )


def _is_memory_error(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def _suggest_remedies(plan: Plan) -> str:
    """The settings that would take less memory, of those that are not at their least."""
    engine, ways = plan.cfg.engine, []
    if plan.microbatch_size > 1:
        ways.append(f"lower batch.at_once ({plan.microbatch_size})")
    if not engine.recompute:
        ways.append("set engine.recompute=true")
    if "deepspeed" in (engine.kind, engine.sharding) and engine.zero < 3:
        ways.append(f"raise engine.zero ({engine.zero})")
    elif engine.kind == "accelerate" and engine.sharding == "ddp":
        ways.append("set engine.sharding=fsdp2")
    return ", or ".join(ways) or "take a smaller model or larger GPUs"
