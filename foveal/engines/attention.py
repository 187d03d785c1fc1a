"""Up to how many tokens self-attention multiplies and normalises by itself, without torch's fused kernel."""

import torch
from torch import nn

from foveal.engines.config import EngineConfig

# On a CPU with AMX explicit products took 0.13 to 0.67 of the fused kernel's time at 50 to 257 tokens, 0.5 to 0.95 at
# 577, and 1.5 to 2.6 times of it from 1,025 on (benchmarks/results/step-notes.md).
_MAX_TOKENS_ON_AMX = 512


def choose_max_explicit_tokens(cfg: EngineConfig, device_type: str) -> int:
    """Return ``engine.max_explicit_attention_tokens``, or for ``auto`` what a new run on this machine has.

    A rule of the hardware, not of a stopwatch: every attempt on one kind of machine has the same bits.
    """
    if cfg.max_explicit_attention_tokens != "auto":
        return cfg.max_explicit_attention_tokens
    multiplies_bf16 = cfg.precision == "bf16" or cfg.float32_matmul_precision == "medium"
    return _MAX_TOKENS_ON_AMX if device_type == "cpu" and multiplies_bf16 and has_amx() else 0


def apply_attention(model: nn.Module, cfg: EngineConfig) -> None:
    """Set it in a model's plain blocks; an ``auto`` that nobody has decided is the fused kernel for every length."""
    tokens = cfg.max_explicit_attention_tokens
    for module in model.modules():
        if hasattr(module, "max_explicit_tokens"):  # foveal.models.attention.SelfAttention
            setattr(module, "max_explicit_tokens", 0 if tokens == "auto" else tokens)  # noqa: B010 - no attribute of any module


def has_explicit_attention(model: nn.Module) -> bool:
    """Return whether a model has blocks that do without the fused kernel, for sequences of some length at least."""
    return any(getattr(module, "max_explicit_tokens", 0) > 0 for module in model.modules())


def has_amx() -> bool:
    """Return whether this processor has matrix instructions for bf16."""
    return torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - get_capabilities, which torch 2.15 has, is not known of the oldest that is supported
