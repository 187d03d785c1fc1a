"""torch.compile of a model for training, and what ``engine.compile=auto`` stands for.

Only the steps of training run compiled. Evaluations, k-NN and pictures run the same modules eagerly
(``eager_forwards``): their batch sizes, numbers of tokens, modes and gradients differ from training's, each combination
would be compiled anew, and they are a small part of a run.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from foveal.engines.config import EngineConfig
from foveal.engines.zero_guard import is_offloaded

CompiledParts = bool | Literal["blocks"]
# Compiled codes for one block: by its place in the model, its number of tokens, and with or without gradients.
_CODES_PER_BLOCK = 4


def choose_compiled_parts(cfg: EngineConfig, device_type: str) -> CompiledParts:
    """Return what a new run compiles on a device; under ``engine.compile=auto`` blocks on a GPU, else nothing.

    auto compiles nothing where tensors move in hooks: ZeRO 3 and FSDP2 gather weights in those of the blocks'
    modules, offloading copies gradients to the host, and nobody has measured what compiled code makes of it on a GPU.
    """
    if cfg.compile != "auto":
        return cfg.compile
    if cfg.uses_deepspeed:
        moves_tensors = cfg.zero == 3 or is_offloaded(cfg.deepspeed.get("zero_optimization", {}))
    else:
        moves_tensors = cfg.kind == "accelerate" and cfg.sharding == "fsdp2"
    return "blocks" if device_type == "cuda" and not moves_tensors else False


def explain_no_compiler(device: torch.device) -> str | None:
    """Return why torch.compile does not work in this process; None if it compiles a small function."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - of a missing compiler, linker, header, Triton, folder: each raises its own
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _probe(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + values


def compile_model(model: nn.Module, cfg: EngineConfig) -> None:
    """Compile a model in place as ``engine.compile`` says: no name of a parameter changes.

    A model's ``transformer_blocks()`` are its blocks; the rest of it stays eager. Blocks of the same structure and
    shapes share one compiled code: a ViT has one for its encoder, and its decoder three.
    """
    if cfg.compile == "blocks":
        from torch._dynamo import config as dynamo_config  # imports for a second

        find_blocks: Callable[[], list[nn.Module]] = getattr(model, "transformer_blocks", list)
        blocks = [block for block in find_blocks() if not _has_inner_hooks(block)]
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, _CODES_PER_BLOCK * len(blocks))
        dynamo_config.optimize_ddp = False  # cuts graphs at DDP's buckets, for which a block is small enough
        for block in blocks:
            # Training has few shapes, all known after a step. Kernels that are not chosen by a stopwatch: the same bits
            # in every attempt at a run, on one kind of GPU and one set of versions.
            block.compile(dynamic=False, options={"deterministic": True})
    elif cfg.is_compiled:
        model.compile()


def _has_inner_hooks(block: nn.Module) -> bool:
    """Whether a module inside has a hook, which the code that blocks share would leave out: dynamo compares no hooks."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())  # noqa: SLF001


def eager_forwards(cfg: EngineConfig) -> AbstractContextManager[Any]:
    """Return a context in which compiled modules run eagerly and nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if cfg.is_compiled else nullcontext()
