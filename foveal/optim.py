"""AdamW, its parameter groups, and the rule for a step whose gradient is not finite."""

from collections.abc import Callable, Collection
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from foveal.config import Config, machine, science

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class OptimConfig(Config):
    """AdamW (Loshchilov & Hutter, 2019) under a warm-up and half a cosine."""

    lr_per_256: float = science(
        1.5e-4, "Peak learning rate for a step of 256 images; scaled by batch.images / 256.", gt=0
    )
    floor_lr: float = science(0.0, "Learning rate at the last step.", ge=0)
    warmup_epochs: float = science(0.0, "Epochs of linear warm-up.", ge=0)
    weight_decay: float = science(0.05, "Decoupled weight decay; vectors, tokens and positions are not decayed.", ge=0)
    betas: Betas = science((0.9, 0.95), "AdamW's decay rates of the two moments.")
    eps: float = science(1e-8, "AdamW's epsilon.", gt=0)
    layer_decay: float = science(1.0, "Factor on the learning rate per block below the head (BEiT, 2021).", gt=0, le=1)
    clip: float | None = science(None, "Largest global gradient norm; none: no clipping.", gt=0)
    fused: bool = machine(True, "One fused kernel for the update where there is no ZeRO partition.")

    def peak(self, images: int) -> float:
        """The peak learning rate of a step of ``images`` images."""
        return self.lr_per_256 * images / 256


def parameter_groups(
    model: nn.Module,
    cfg: OptimConfig,
    depth_of: Callable[[str], int] | None = None,
    deepest: int = 0,
    undecayed: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay on matrices only, the learning rate scaled by depth.

    ``depth_of`` maps a parameter's name to its layer, 0 (embedding) to ``deepest`` (head); without it there is one
    depth. ``undecayed`` are the names of further parameters without weight decay. Each group carries ``lr_scale`` and a
    readable ``name``; the order is the order of first appearance.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tokens = {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "freqs"}
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in tokens or name in undecayed
        depth = depth_of(name) if depth_of else deepest
        title = f"layer {depth}, {'no decay' if plain else 'decay'}"
        group = groups.setdefault(
            title,
            {
                "name": title,
                "params": [],
                "weight_decay": 0.0 if plain else cfg.weight_decay,
                "lr_scale": cfg.layer_decay ** (deepest - depth),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, remembers the gradient norm, and does nothing on a gradient that is not finite.

    For the engines that have no such guard of their own (Plain, Accelerate, DeepSpeed's ZeRO 0, which in fp32 would
    write NaN into the weights). A skipped step leaves weights and moments bit for bit as they were.
    """

    def __init__(self, groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)
        self.clip = cfg.clip
        self.norm = 0.0
        self.applied = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, then update; or skip, and say so in ``applied``."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = self.total_norm([p.grad for p in parameters])
        self.norm = float(norm)
        self.applied = bool(norm.isfinite())
        if not self.applied:
            return
        if self.clip is not None:
            clip_grads_with_norm_(parameters, self.clip, norm)
        super().step(closure)

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together; every rank holds them whole."""
        return get_total_norm(gradients)


def plain_adamw(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW as torch has it, for an engine (DeepSpeed's ZeRO 1 to 3) that clips and guards by itself."""
    return torch.optim.AdamW(groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's moments of a parameter; before its first update the zeros that AdamW itself would begin with."""
    state = optimizer.state[parameter]
    if not state:
        # Where AdamW keeps its counter: on the device for the fused kernel, else on the CPU.
        state["step"] = torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """How many updates AdamW has applied: its bias correction counts them."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def count_from(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Go on counting updates from here."""
    for state in optimizer.state.values():
        state["step"].fill_(updates)
