"""AdamW, SGD and LARS, their parameter groups, and the rule for a step whose gradient is not finite."""

from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

import timm.optim
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveal.config import Config, machine, science

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class OptimConfig(Config):
    """An optimizer (AdamW: Loshchilov & Hutter, 2019) under a warm-up and a schedule."""

    kind: Literal["adamw", "sgd", "lars"] = science(
        "adamw", "The optimizer: AdamW, SGD with momentum, or LARS (You et al., 2017)."
    )
    lr_per_256: float = science(
        1.5e-4, "Peak learning rate for a step of 256 images; scaled by batch.images / 256.", gt=0
    )
    floor_lr: float = science(
        0.0, "The least that a schedule comes down to: at the last step of a cosine, after drops of the others.", ge=0
    )
    warmup_epochs: float = science(0.0, "Epochs of linear warm-up.", ge=0)
    schedule: Literal["cosine", "step", "constant", "plateau"] = science(
        "cosine", "After the warm-up; plateau, of fine-tuning, follows early_stopping.metric."
    )
    step_epochs: tuple[float, ...] = science((), "For step: the epochs after which the rate drops, ascending.")
    step_factor: float = science(0.1, "For step and plateau: what a drop multiplies the rate by.", gt=0, lt=1)
    plateau_patience: int = science(
        3, "For plateau: evaluations in a row without a better one, after which the rate drops.", ge=1
    )
    weight_decay: float = science(
        0.05, "AdamW's is decoupled, SGD's and LARS's L2; vectors, tokens and positions are not decayed.", ge=0
    )
    momentum: float = science(0.9, "For sgd and lars: what their average of gradients keeps of itself.", ge=0, lt=1)
    betas: Betas = science((0.9, 0.95), "For adamw: the decay rates of the two moments.")
    eps: float = science(1e-8, "For adamw: its epsilon.", gt=0)
    layer_decay: float = science(1.0, "Factor on the learning rate per block below the head (BEiT, 2021).", gt=0, le=1)
    clip: float | None = science(None, "Largest global gradient norm; none: no clipping.", gt=0)
    fused: bool = machine(True, "For adamw: one fused kernel for the update where there is no ZeRO partition.")

    def peak_lr(self, batch_size: int) -> float:
        """The peak learning rate of a step of ``images`` images."""
        return self.lr_per_256 * batch_size / 256

    @property
    def moments_per_parameter(self) -> int:
        """How many numbers the optimizer keeps of each that it trains."""
        return 2 if self.kind == "adamw" else int(self.momentum > 0)


def parameter_groups(
    model: nn.Module,
    cfg: OptimConfig,
    depth_of: Callable[[str], int] | None = None,
    max_depth: int = 0,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for an optimizer: weight decay on matrices only, the learning rate scaled by depth.

    ``depth_of`` maps a parameter's name to its layer, 0 (embedding) to ``deepest`` (head); without it there is one
    depth. ``undecayed`` are the names of further parameters without weight decay. Each group carries ``lr_scale`` and a
    readable ``name``; the order is the order of first appearance.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tokens = {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "freqs"}
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in tokens or name in no_weight_decay
        depth = depth_of(name) if depth_of else max_depth
        title = f"layer {depth}, {'no decay' if plain else 'decay'}"
        group = groups.setdefault(
            title,
            {
                "name": title,
                "params": [],
                "weight_decay": 0.0 if plain else cfg.weight_decay,
                "lr_scale": cfg.layer_decay ** (max_depth - depth),
                "always_adapt": not plain,  # LARS alone reads it
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


class GuardedOptimizer(torch.optim.Optimizer):
    """An optimizer that clips, remembers the gradient norm, and does nothing on a gradient that is not finite.

    Beside one of torch's in the bases of a class, for the engines that have no such guard of their own (Plain,
    Accelerate, DeepSpeed's ZeRO 0, which in fp32 would write NaN into the weights). A skipped step leaves weights and
    moments bit for bit as they were. ``updates`` counts those that were applied.
    """

    max_grad_norm: float | None = None
    grad_norm = 0.0
    step_applied = True
    num_updates = 0

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, then update; or skip, and say so in ``applied``."""
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
        """The norm of all gradients together; every rank holds them whole."""
        return get_total_norm(gradients)


class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """AdamW behind the guard."""

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)
        self.max_grad_norm = cfg.clip


class GuardedSGD(GuardedOptimizer, torch.optim.SGD):
    """SGD with momentum behind the guard; weight decay is L2, added to the gradient before the momentum (torch's)."""

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, momentum=cfg.momentum)
        self.max_grad_norm = cfg.clip


class GuardedLARS(GuardedOptimizer, timm.optim.Lars):
    """LARS (You et al., "Large batch training of convolutional networks", 2017) behind the guard, as timm has it.

    A matrix moves by 0.001 |w| / (|g| + decay |w|) of its decayed gradient (|g + decay w| below the line in MAE's own).
    timm leaves that ratio out of groups without weight decay, whatever their shape; here it is left out of vectors,
    tokens and positions alone, which take SGD's step without decay, and matrices have it also where the decay is 0, as
    in MAE's linear probing (He et al., 2022, A.2).
    """

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, momentum=cfg.momentum)  # pyright: ignore[reportArgumentType] - annotated by its default, 0
        self.max_grad_norm = cfg.clip


def build_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> GuardedOptimizer:
    """The optimizer of these settings behind the guard."""
    return {"adamw": GuardedAdamW, "sgd": GuardedSGD, "lars": GuardedLARS}[cfg.kind](param_groups, cfg)


def build_plain_adamw(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW as torch has it, for an engine (DeepSpeed's ZeRO 1 to 3) that clips and guards by itself."""
    return torch.optim.AdamW(param_groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)


def get_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """An optimizer's moments of a parameter; before its first update the zeros that it would begin with.

    SGD and LARS begin with the gradient itself, which is what their first update makes of zeros: they do not dampen.
    """
    state = optimizer.state[parameter]
    if isinstance(optimizer, torch.optim.AdamW):
        names = ("exp_avg", "exp_avg_sq")
        # Where AdamW keeps its counter: on the device for the fused kernel, else on the CPU.
        counter = parameter.device if optimizer.defaults["fused"] else "cpu"
        first = {} if state else {"step": torch.zeros((), device=counter)}
    else:
        names, first = (("momentum_buffer",) if optimizer.defaults["momentum"] else ()), {}
    state |= first | {name: torch.zeros_like(parameter, requires_grad=False) for name in names if name not in state}
    return {name: state[name] for name in names}


def get_num_updates(optimizer: torch.optim.Optimizer) -> int:
    """How many updates were applied: the guard counts them, else AdamW does for its bias correction."""
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer.num_updates
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Go on counting updates from here."""
    if isinstance(optimizer, GuardedOptimizer):
        optimizer.num_updates = num_updates
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"].fill_(num_updates)
