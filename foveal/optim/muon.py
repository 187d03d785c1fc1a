"""Muon for the hidden matrices of a model, with AdamW for all other parameters, as one optimizer."""

import logging
from typing import Any

import torch
from torch import Tensor

from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer, update_unless

_log = logging.getLogger(__name__)


class GuardedMuon(GuardedOptimizer):
    """torch's Muon for groups with ``hidden_matrices``, torch's AdamW for the other groups, with one guard.

    One gradient norm and one decision to skip hold for all parameters.

    Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) orthogonalizes the Nesterov
    momentum of a matrix. Its update is scaled by 0.2 sqrt(max(rows, columns)), so that it has the RMS of an AdamW
    update, and one learning rate and weight decay serve both rules (Liu et al., "Muon is Scalable for LLM Training",
    2025). An attention's fused qkv weight is one matrix.

    torch orthogonalizes by five Newton-Schulz iterations in bf16, whatever the engine's precision. Replicated ranks
    compute the same bits from the same reduced gradient, if their devices are of one kind. Another number of ranks, or
    another split into microbatches, changes a gradient in its last bits. An entry that then rounds to another bf16
    number changes the update by up to a few percent of its norm, because the iterations enlarge small singular values.
    """

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, {"lr": cfg.lr_per_256})
        self.max_grad_norm = cfg.max_grad_norm
        self._optimizers: dict[bool, torch.optim.Optimizer] = {}  # by ``hidden_matrices`` of their groups
        if matrices := self._groups(hidden_matrices=True):
            self._optimizers[True] = torch.optim.Muon(
                matrices, lr=cfg.lr_per_256, momentum=cfg.momentum, adjust_lr_fn="match_rms_adamw"
            )
        else:
            _log.warning("optim.name=muon: the model has no hidden matrix to train, AdamW updates all parameters")
        if others := self._groups(hidden_matrices=False):
            self._optimizers[False] = torch.optim.AdamW(
                others, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused
            )

    def _groups(self, *, hidden_matrices: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["hidden_matrices"] is hidden_matrices]

    def _update_unless(self, refused: Tensor) -> None:
        for hidden_matrices, optimizer in self._optimizers.items():
            # At every step, because Accelerate replaces groups and state of the optimizer that it wraps.
            optimizer.param_groups = self._groups(hidden_matrices=hidden_matrices)
            optimizer.state = self.state
            update_unless(refused, optimizer, optimizer.step)
