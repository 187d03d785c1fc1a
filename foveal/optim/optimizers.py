"""The table of optimizers, and what is built from it: parameter groups and optimizers.

Engines, checkpoints and the forecast know of an optimizer what its row in ``OPTIMIZERS`` says. A further optimizer is a
class here (or in a module of its own), a row, and a value of ``OptimConfig.name``.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import timm.optim
import torch
from torch import Tensor, nn

from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import UpdateRule
from foveal.optim.muon import GuardedMuon


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
    step without decay; matrices have it also at decay 0, as in MAE's code (the linear probe of appendix A.1, table 10).
    """

    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, lr=cfg.lr_per_256, momentum=cfg.momentum)  # pyright: ignore[reportArgumentType] - annotated by its default, 0
        self.max_grad_norm = cfg.max_grad_norm


def build_unguarded_adamw(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """Build torch's AdamW for an engine that clips and guards by itself (DeepSpeed's ZeRO 1 to 3)."""
    return torch.optim.AdamW(param_groups, lr=cfg.lr_per_256, betas=cfg.betas, eps=cfg.eps, fused=cfg.fused)


@dataclass(frozen=True)
class OptimizerSpec:
    """A row of the table.

    ``build``: the optimizer with the guard, from parameter groups and settings. ``rule``: of all parameters, or with
    ``matrix_rule`` of all but the hidden matrices (``is_hidden_matrix``), which then have groups of their own.
    ``build_unguarded``: the optimizer for DeepSpeed's ZeRO 1 to 3; its groups have one rule. ``unsupported``: the
    shardings that exclude the optimizer, and a clause that says why; plain and ddp take every optimizer.
    """

    build: Callable[[list[dict[str, Any]], OptimConfig], GuardedOptimizer]
    rule: Callable[[OptimConfig], UpdateRule]
    matrix_rule: Callable[[OptimConfig], UpdateRule] | None = None
    build_unguarded: Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer] | None = None
    unsupported: Mapping[Literal["fsdp2", "deepspeed"], str] = field(default_factory=dict)


def _adamw_rule(cfg: OptimConfig) -> UpdateRule:
    return UpdateRule(("exp_avg", "exp_avg_sq"), counts_steps=True, temporary_copies=0 if cfg.fused else 1)


def _momentum_rule(cfg: OptimConfig) -> UpdateRule:
    return UpdateRule(("momentum_buffer",) if cfg.momentum > 0 else ())


def _muon_matrix_rule(_cfg: OptimConfig) -> UpdateRule:
    return UpdateRule(("momentum_buffer",))  # torch updates one matrix after the other


_ADAMW_ONLY = "does not run on DeepSpeed, which takes adamw only"

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(GuardedAdamW, _adamw_rule, build_unguarded=build_unguarded_adamw),
    "sgd": OptimizerSpec(GuardedSGD, _momentum_rule, unsupported={"deepspeed": _ADAMW_ONLY}),
    "lars": OptimizerSpec(
        GuardedLARS,
        _momentum_rule,
        unsupported={
            "fsdp2": "needs the norms of whole weights, which engine.sharding=fsdp2 cuts up",
            "deepspeed": _ADAMW_ONLY,
        },
    ),
    "muon": OptimizerSpec(
        GuardedMuon,
        _adamw_rule,
        matrix_rule=_muon_matrix_rule,
        unsupported={
            "fsdp2": "needs whole matrices, which engine.sharding=fsdp2 cuts up",
            "deepspeed": "does not run on DeepSpeed, whose ZeRO flattens the matrices that it needs",
        },
    ),
}

_UNDECAYED = {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "freqs"}
# Modules with matrices that are not hidden: embeddings of patches and positions, and output layers.
_NOT_HIDDEN = {
    *("patch_embed", "rel_pos", "rel_pos_bias", "rel_pos_mlp", "relative_position_bias_table"),
    *("head", "predict", "guess_image", "project", "project_cls", "project_patches"),
    *("head_dist", "heads", "heads_dist", "aux_head", "fc", "classifier", "classif", "last_linear"),  # timm's heads
}


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the matrix of a hidden layer: two dimensions, in no embedding and no output layer."""
    return parameter.ndim == 2 and _NOT_HIDDEN.isdisjoint(name.split("."))


def parameter_groups(
    model: nn.Module,
    cfg: OptimConfig,
    depth_of: Callable[[str], int] | None = None,
    max_depth: int = 0,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay on matrices only, the learning rate scaled by depth.

    ``depth_of`` maps a parameter's name to its layer, 0 (embedding) to ``max_depth`` (head); None: a single depth.
    ``no_weight_decay`` names further parameters without weight decay. A group has ``lr_scale``, the ``rule`` of its
    update and a readable ``name``; groups are in order of first appearance.
    """
    spec = OPTIMIZERS[cfg.name]
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        undecayed = parameter.ndim <= 1 or name.rsplit(".", 1)[-1] in _UNDECAYED or name in no_weight_decay
        hidden = spec.matrix_rule is not None and not undecayed and is_hidden_matrix(name, parameter)
        rule = spec.matrix_rule if spec.matrix_rule is not None and hidden else spec.rule
        depth = depth_of(name) if depth_of else max_depth
        title = f"layer {depth}, {'no decay' if undecayed else 'decay'}{', hidden matrices' if hidden else ''}"
        group = groups.setdefault(
            title,
            {
                "name": title,
                "params": [],
                "weight_decay": 0.0 if undecayed else cfg.weight_decay,
                "lr_scale": cfg.layer_decay ** (max_depth - depth),
                "rule": rule(cfg),
                "hidden_matrices": hidden,
                "always_adapt": not undecayed,  # only LARS reads it
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> GuardedOptimizer:
    """Build the guarded optimizer of the settings."""
    return OPTIMIZERS[cfg.name].build(param_groups, cfg)


def build_unguarded_optimizer(param_groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the settings for an engine that clips and guards by itself (DeepSpeed's ZeRO 1 to 3)."""
    build = OPTIMIZERS[cfg.name].build_unguarded
    assert build is not None, "check_engine_config refuses an optimizer that DeepSpeed cannot run"
    return build(param_groups, cfg)


def get_num_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of applied updates, counted by the guard or by AdamW for its bias correction."""
    if isinstance(optimizer, GuardedOptimizer):
        return optimizer.num_updates
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def set_num_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Set the number of applied updates, as after loading a checkpoint."""
    if isinstance(optimizer, GuardedOptimizer):
        optimizer.num_updates = num_updates
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(num_updates)


def count_moment_elements(cfg: OptimConfig, trained: int, hidden: int) -> int:
    """Return the elements of all moments, of ``trained`` elements of which ``hidden`` follow the matrix rule."""
    return _sum_over_rules(cfg, trained, hidden, lambda rule: len(rule.moments))


def count_temporary_elements(cfg: OptimConfig, trained: int, hidden: int) -> int:
    """Return the elements that an update allocates, of ``trained`` of which ``hidden`` follow the matrix rule."""
    return _sum_over_rules(cfg, trained, hidden, lambda rule: rule.temporary_copies)


def _sum_over_rules(cfg: OptimConfig, trained: int, hidden: int, weight: Callable[[UpdateRule], int]) -> int:
    spec = OPTIMIZERS[cfg.name]
    matrix_rule = spec.matrix_rule or spec.rule
    return weight(spec.rule(cfg)) * (trained - hidden) + weight(matrix_rule(cfg)) * hidden
