"""Out-of-memory errors become one message that names the settings to lower, with an exit code that ends restarts."""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from foveal.errors import DataError, OutOfMemoryError
from foveal.training.out_of_memory import diagnose_out_of_memory
from foveal.training.plan import Plan
from pretrain.config import PretrainConfig
from pretrain.plan import plan_pretraining as plan_of

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ERRORS: list[tuple[Exception, str, str]] = [
    (torch.OutOfMemoryError(CUDA), "", "CUDA out of memory"),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
        " of the host",
        "can't allocate",
    ),
    (MemoryError("Unable to allocate 7.1 PiB for an array"), " of the host", "Unable to allocate 7"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), " of the host", "Cannot allocate memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "", "CUBLAS"),
    (
        dist.DistBackendError("NCCL error, ncclUnhandledCudaError\nCuda failure 2 'out of memory'"),
        " of the host",
        "NCCL",
    ),
]


@pytest.fixture
def plan(digits: Path) -> Plan:
    sizes = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 32, "depth": 2, "heads": 2}
    tree = {"epochs": 1, "model": sizes, "decoder": {"width": 16, "depth": 1, "heads": 2}, "optim": {}}
    tree |= {
        "data": {"path": str(digits), "image_size": 16, "channels": 1},
        "batch": {"global_size": 64, "max_micro_size": 32},
    }
    return plan_of(PretrainConfig.from_dict(tree, "the test"), 2)


@pytest.mark.parametrize(("error", "memory", "detail"), ERRORS)
def test_the_sentence_names_what_to_lower(error: Exception, memory: str, detail: str, plan: Plan) -> None:
    wrapped = RuntimeError("the engine could not be made")
    wrapped.__cause__ = error
    for raised in (error, wrapped):
        diagnosis = diagnose_out_of_memory(raised, "pretrain", plan)
        assert isinstance(diagnosis, OutOfMemoryError)
        assert diagnosis.exit_code == 2
        text = str(diagnosis)
        assert text.startswith(f"pretrain ran out of memory{memory} on rank 0, with 32 images per forward (")
        assert detail in text
        assert "\n" not in text
        assert (
            "lower batch.max_micro_size (32), or set engine.activation_checkpointing=true, or raise engine.zero (1)"
            in text
        )


def test_only_what_can_still_be_lowered_is_said(plan: Plan) -> None:
    engine = plan.cfg.engine.model_copy(update={"activation_checkpointing": True, "zero": 3})
    object.__setattr__(plan, "cfg", plan.cfg.model_copy(update={"engine": engine}))
    object.__setattr__(plan, "microbatch_size", 1)
    assert "): take a smaller model or larger GPUs" in str(diagnose_out_of_memory(MemoryError(), "pretrain", plan))


def test_other_errors_are_left_alone() -> None:
    for error in (RuntimeError("Connection closed by peer"), DataError("out of memory"), ValueError("out of memory")):
        assert diagnose_out_of_memory(error, "pretrain") is None


def test_before_there_is_a_plan() -> None:
    message = str(diagnose_out_of_memory(MemoryError("Unable to allocate 1 PiB"), "distill"))
    assert message == "distill ran out of memory of the host on rank 0 before its first step (Unable to allocate 1 PiB)"
