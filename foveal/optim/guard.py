"""The guard of every optimizer against non-finite gradients, with clipping; it reads nothing from the device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveal.optim.moments import get_or_create_moments


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips, records the gradient norm, and skips a step with a non-finite gradient.

    A base class, listed before a torch optimizer, for engines without a guard of their own (plain, Accelerate, and
    DeepSpeed's ZeRO 0, which in fp32 would write NaN into the weights). A skipped step leaves weights, moments and
    counters bit for bit as they were. The decision is made on the device and the host does not wait for it:
    ``grad_norm`` and ``step_applied`` are scalars on the device. ``total_norm`` returns the global norm of gradients
    that every rank holds in full; an engine that shards gradients replaces it.
    """

    max_grad_norm: float | None = None
    grad_norm: Tensor
    step_applied: Tensor
    total_norm: Callable[[list[Tensor]], Tensor] = staticmethod(get_total_norm)
    _num_updates: int | Tensor = 0

    @property
    def num_updates(self) -> int:
        """Number of applied updates; reading it waits for the device."""
        return int(self._num_updates)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        self._num_updates = value

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and update, or skip; ``step_applied`` records which."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = self.total_norm([p.grad for p in parameters])
        self.step_applied = self.grad_norm.isfinite()
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.max_grad_norm, self.grad_norm)
        self._update_unless(~self.step_applied)
        self._num_updates = self._num_updates + self.step_applied

    def _update_unless(self, refused: Tensor) -> None:
        update_unless(refused, self, super().step)


@torch.no_grad()
def update_unless(refused: Tensor, optimizer: torch.optim.Optimizer, update: Callable[[], object]) -> None:
    """Call ``update``, a step of ``optimizer``, which has no effect where ``refused``, a scalar on the device, is True.

    torch's fused kernels skip on the device. Any other update is made parameter by parameter and taken back, so that
    what is kept for that is of one parameter at a time; it must change its moments in place. A counter on the host, as
    that of AdamW without its fused kernel, waits for the device.
    """
    groups = optimizer.param_groups
    if all(group.get("fused") for group in groups):
        setattr(optimizer, "found_inf", refused.float())  # noqa: B010 - torch's protocol, which its stubs lack
        update()
        return
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                optimizer.param_groups = [group | {"params": [parameter]}]
                _update_or_restore(refused, optimizer, parameter, update)
    optimizer.param_groups = groups


def _update_or_restore(
    refused: Tensor, optimizer: torch.optim.Optimizer, parameter: Tensor, update: Callable[[], object]
) -> None:
    get_or_create_moments(optimizer, parameter)
    values = [parameter, *optimizer.state[parameter].values()]
    before = [value.clone() for value in values]
    update()
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(refused.to(value.device), old, value))
