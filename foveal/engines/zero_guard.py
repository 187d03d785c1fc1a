"""Non-finite steps under DeepSpeed's ZeRO 1 to 3, skipped on the device.

DeepSpeed reads the gradient norm on the host in every step, to decide whether it is finite: the host waits for the
device. Here torch's fused AdamW decides, by ``found_inf``. Uses internal attributes of DeepSpeed 0.19.8;
tests/unit/engines/test_zero_guard.py fails where another release differs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveal.distributed.world import World
from foveal.optim.config import OptimConfig


def is_decided_on_device(optim: OptimConfig, zero_stage: int, zero_options: Mapping[str, Any]) -> bool:
    """Whether a ``ZeroGuard`` takes DeepSpeed's place.

    DeepSpeed keeps the decision, and its read, where it offloads (its norm is then computed on the host) and without
    torch's fused kernel.
    """
    return zero_stage > 0 and optim.fused and not is_offloaded(zero_options)


def is_offloaded(zero_options: Mapping[str, Any]) -> bool:
    """Whether options of ``zero_optimization`` keep the optimizer's states or the weights on the host."""
    offloads = [zero_options.get(name) for name in ("offload_optimizer", "offload_param")]
    return any(isinstance(offload, dict) and offload.get("device", "none") != "none" for offload in offloads)


class ZeroGuard:
    """Takes the place of DeepSpeed's decision in the steps of its ZeRO optimizer.

    ``grad_norm`` and ``step_applied`` of the last step are scalars on the device, equal on every rank. Under ZeRO 1 and
    2 DeepSpeed computes no norm (``compute_grad_norm: false``): one norm of all partitions takes one collective, where
    DeepSpeed has one per parameter group. Under ZeRO 3 its norm and its clipping stay.
    """

    grad_norm: Tensor
    step_applied: Tensor

    def __init__(
        self,
        zero_optimizer: Any,
        optimizer: torch.optim.Optimizer,
        zero_stage: int,
        max_grad_norm: float | None,
        world: World,
    ) -> None:
        self._zero = zero_optimizer
        self._num_observed = 0
        self._optimizer = optimizer
        self._world = world
        self._take_step = zero_optimizer.step
        if zero_stage == 3:
            zero_optimizer.step = self._step_zero3
        else:
            zero_optimizer.step = self._step_zero12
            if max_grad_norm is not None:
                self._max_grad_norm = max_grad_norm
                optimizer.register_step_pre_hook(self._clip)

    def _step_zero12(self) -> None:
        self._observe_norm(self._partitioned_norm())
        self._take_step()

    def _step_zero3(self) -> None:
        num_observed = self._num_observed
        with self._observing_norm():
            self._take_step()
        assert self._num_observed == num_observed + 1, "DeepSpeed asks once per step whether the norm is finite"

    def _observe_norm(self, norm: Tensor) -> bool:
        """Decide by the norm whether the step is applied. Return False: to the host it always is."""
        self._num_observed += 1
        self.grad_norm = norm
        self.step_applied = norm.isfinite()
        setattr(self._optimizer, "found_inf", (~self.step_applied).float())  # noqa: B010 - as in foveal/optim/guard.py
        return False

    @contextmanager
    def _observing_norm(self) -> Iterator[None]:
        """Let DeepSpeed ask ``_observe_norm`` whether the norm, infinite for any that is not finite, is invalid."""
        from deepspeed.runtime.zero import stage3

        original = stage3.is_invalid_grad_norm
        stage3.is_invalid_grad_norm = self._observe_norm
        try:
            yield
        finally:
            stage3.is_invalid_grad_norm = original

    def _partitioned_norm(self) -> Tensor:
        """Return the norm of the gradients of all ranks' partitions; padding is 0."""
        gradients = [gradient for group in self._zero.averaged_gradients.values() for gradient in group]
        square = get_total_norm(gradients).to(self._world.device).square()
        if self._world.size > 1:
            dist.all_reduce(square)
        return square.sqrt()

    def _clip(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Clip the gradient of the partition that DeepSpeed is about to update."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grads_with_norm_(parameters, self._max_grad_norm, self.grad_norm)
