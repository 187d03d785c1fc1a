"""The guard of every optimizer against non-finite gradients, with clipping."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips, records the gradient norm, and skips a step with a non-finite gradient.

    A base class, listed before a torch optimizer, for engines without a guard of their own (plain, Accelerate, and
    DeepSpeed's ZeRO 0, which in fp32 would write NaN into the weights). A skipped step leaves weights and moments bit
    for bit as they were. ``num_updates`` counts applied updates. ``total_norm`` returns the global norm of gradients
    that every rank holds in full; an engine that shards gradients replaces it.
    """

    max_grad_norm: float | None = None
    grad_norm = 0.0
    step_applied = True
    num_updates = 0
    total_norm: Callable[[list[Tensor]], Tensor] = staticmethod(get_total_norm)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and update, or skip; ``step_applied`` records which."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = self.total_norm([p.grad for p in parameters])
        self.grad_norm = float(norm)
        self.step_applied = bool(norm.isfinite())
        if not self.step_applied:
            return
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        super().step(closure)
        self.num_updates += 1
