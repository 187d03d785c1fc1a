"""AdamW, SGD and LARS, their parameter groups, and the guard against non-finite gradients."""

from collections.abc import Callable, Collection
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveal.optim.config import OptimConfig


def parameter_groups(
    model: nn.Module,
    cfg: OptimConfig,
    depth_of: Callable[[str], int] | None = None,
    max_depth: int = 0,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay on matrices only, the learning rate scaled by depth.

    ``depth_of`` maps a parameter's name to its layer, 0 (embedding) to ``max_depth`` (head); None: a single depth.
    ``no_weight_decay`` names further parameters without weight decay. A group has ``lr_scale`` and a readable ``name``;
    groups are in order of first appearance.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tokens = {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "freqs"}
        undecayed = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in tokens or name in no_weight_decay
        depth = depth_of(name) if depth_of else max_depth
        title = f"layer {depth}, {'no decay' if undecayed else 'decay'}"
        group = groups.setdefault(
            title,
            {
                "name": title,
                "params": [],
                "weight_decay": 0.0 if undecayed else cfg.weight_decay,
                "lr_scale": cfg.layer_decay ** (max_depth - depth),
                "always_adapt": not undecayed,  # only LARS reads it
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips, records the gradient norm, and skips a step with a non-finite gradient.

    A base class, listed before a torch optimizer, for engines without a guard of their own (plain, Accelerate, and
    DeepSpeed's ZeRO 0, which in fp32 would write NaN into the weights). A skipped step leaves weights and moments bit
    for bit as they were. ``num_updates`` counts applied updates.
    """

    max_grad_norm: float | None = None
    grad_norm = 0.0
    step_applied = True
    num_updates = 0

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

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the global norm of the gradients, which every rank holds in full."""
        return get_total_norm(gradients)


class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW with the guard."""

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)
        self.max_grad_norm = cfg.max_grad_norm


class GuardedSGD(GuardedOptimizer, torch.optim.SGD):
    """torch's SGD with momentum and the guard; weight decay is L2, added to the gradient before the momentum."""

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, momentum=cfg.momentum)
        self.max_grad_norm = cfg.max_grad_norm


class GuardedLARS(GuardedOptimizer, timm.optim.Lars):
    """timm's LARS (You et al., "Large batch training of convolutional networks", 2017) with the guard.

    A matrix's decayed gradient is scaled by 0.001 |w| / (|g| + decay |w|); MAE's code has |g + decay w| as denominator.
    timm omits that ratio in all groups without weight decay. Here vectors, tokens and positions omit it and take SGD's
    step without decay; matrices have it also at decay 0, as in MAE's linear probing (He et al., 2022, A.2).
    """

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, momentum=cfg.momentum)  # pyright: ignore[reportArgumentType] - annotated by its default, 0
        self.max_grad_norm = cfg.max_grad_norm


def build_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> GuardedOptimizer:
    """Build the guarded optimizer of the settings."""
    return {"adamw": GuardedAdamW, "sgd": GuardedSGD, "lars": GuardedLARS}[cfg.name](param_groups, cfg)


def build_unguarded_adamw(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """Build torch's AdamW for an engine that clips and guards by itself (DeepSpeed's ZeRO 1 to 3)."""
    return torch.optim.AdamW(param_groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)


def get_or_create_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return a parameter's moments by name; before its first update they are created as zeros.

    Zeros are exact for SGD and LARS too: without dampening, the first update of a zero buffer is the gradient itself.
    """
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.AdamW):
        names = ("exp_avg", "exp_avg_sq")
        # AdamW's step counter is on the device for the fused kernel, else on the CPU.
        counter_device = parameter.device if optimizer.defaults["fused"] else "cpu"
        counter = {} if state else {"step": torch.zeros((), device=counter_device)}
    else:
        names = ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
        counter = {}
    state |= counter | {name: torch.zeros_like(parameter, requires_grad=False) for name in names if name not in state}
    return {name: state[name] for name in names}


def get_num_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of applied updates, counted by the guard or by AdamW for its bias correction."""
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer.num_updates
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Set the number of applied updates, as after loading a checkpoint."""
    if isinstance(optimizer, GuardedOptimizer):
        optimizer.num_updates = num_updates
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(num_updates)
