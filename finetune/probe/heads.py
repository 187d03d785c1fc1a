"""Heads trained by gradient steps on cached features: linear heads by LARS, attentive heads by AdamW.

All learning rates train in one pass. Initialization and batches are keyed by the seed, so the same features give the
same heads. G learning rates, B images of a batch, M images of a subset, F feature dimensions, K classes.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from finetune.probe.features import LayerFeatures
from finetune.probe.plan import ProbePlan
from foveal.engines.base import autocast
from foveal.models.probes import AttentiveHead, init_equal_linear_heads
from foveal.optim.optimizers import parameter_groups
from foveal.optim.schedule import warmup_cosine_lr
from foveal.seeding import derive_key, draw_permutation

T = TypeVar("T")
Resumable = Generator[None, None, T]  # yields between slices of work, so that ranks can agree to continue
Predictor = Callable[[LayerFeatures], Resumable[Tensor]]  # predicted classes by candidate value, int64 [G, M]

_MOMENTUM = 0.9
_TRUST_COEFFICIENT, _EPSILON = 1e-3, 1e-8


def fit_linear_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Train linear heads on batch-normalized features (no affine) by LARS without weight decay.

    Head and optimizer are MAE's (He et al., 2022, appendix A.1, table 10); the features are of one fixed view of each
    image, where MAE draws a new crop and flip in every epoch.
    """
    device, peak_lrs = train.labels.device, plan.probe.linear_lr_per_256
    schedule = _HeadSchedule(plan, len(train))
    width = train.all_images_memmap.shape[-1]
    with _seeded_init(plan, "linear"):
        weight_GKF, bias_GK = init_equal_linear_heads(width, len(plan.classes), len(peak_lrs))
    weight_GKF, bias_GK = weight_GKF.to(device).requires_grad_(), bias_GK.to(device).requires_grad_()
    weight_momentum, bias_momentum = torch.zeros_like(weight_GKF), torch.zeros_like(bias_GK)
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device)

    def logits(features_BF: Tensor) -> Tensor:
        return torch.einsum("bf,gkf->gbk", norm(features_BF), weight_GKF) + bias_GK[:, None]

    for step, rows in schedule.batches():
        loss = _sum_head_losses(logits(train.load(rows)), train.labels[rows])
        weight_grad, bias_grad = torch.autograd.grad(loss, [weight_GKF, bias_GK])
        lr_G = torch.tensor(schedule.learning_rates(peak_lrs, step), device=device)
        lars_step(weight_GKF.detach(), weight_grad, weight_momentum, lr_G)
        momentum_step(bias_GK.detach(), bias_grad, bias_momentum, lr_G)
        if schedule.is_epoch_end(step):
            yield
    norm.eval()
    return lambda features: predict_classes_per_head(features, logits, plan.cfg.batch.max_micro_size)


def lars_step(weights: Tensor, grads: Tensor, momentum_buffers: Tensor, lr_per_head: Tensor) -> None:
    """Update G weights [G, ...] in place by LARS (You et al., 2017) without decay, with learning rates [G].

    Each head has its own trust ratio, 1e-3 times the norm of its weight over the norm of its gradient.
    """
    weight_norm_G, grad_norm_G = weights.flatten(1).norm(dim=1), grads.flatten(1).norm(dim=1)
    ratio_G = _TRUST_COEFFICIENT * weight_norm_G / (grad_norm_G + _EPSILON)
    trust_G = torch.where((weight_norm_G > 0) & (grad_norm_G > 0), ratio_G, 1.0)
    momentum_step(weights, grads * _broadcast_per_head(trust_G, weights), momentum_buffers, lr_per_head)


def momentum_step(weights: Tensor, grads: Tensor, momentum_buffers: Tensor, lr_per_head: Tensor) -> None:
    """Update G weights [G, ...] in place by SGD with momentum, with learning rates [G]."""
    momentum_buffers.mul_(_MOMENTUM).add_(grads)
    weights.sub_(momentum_buffers * _broadcast_per_head(lr_per_head, weights))


def _broadcast_per_head(values_G: Tensor, weights: Tensor) -> Tensor:
    """Return values [G] as [G, 1, ...], which broadcasts with weights [G, ...]."""
    return values_G.view(-1, *[1] * (weights.ndim - 1))


def fit_attentive_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Train attentive pooling with one query and a linear head by AdamW, one head per learning rate."""
    optim, device, schedule = plan.cfg.optim, train.labels.device, _HeadSchedule(plan, len(train))
    peak_lrs = plan.probe.attentive_lr_per_256
    heads, groups = [], []
    for index in range(len(peak_lrs)):
        with _seeded_init(plan, "attentive"):  # heads have equal initial weights and differ only in learning rate
            heads.append(
                AttentiveHead(train.all_images_memmap.shape[-1], plan.encoder["heads"], len(plan.classes)).to(device)
            )
        head_groups = parameter_groups(heads[-1], optim, no_weight_decay=("pool.latent",))
        groups += [group | {"head": index} for group in head_groups]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)

    def logits(patches_BLD: Tensor) -> Tensor:
        with autocast(device, plan.cfg.engine.precision):
            return torch.stack([head(patches_BLD) for head in heads])

    for step, rows in schedule.batches():
        _sum_head_losses(logits(train.load(rows)), train.labels[rows]).backward()
        if optim.max_grad_norm is not None:
            for head in heads:
                clip_grad_norm_(head.parameters(), optim.max_grad_norm)
        lr_G = schedule.learning_rates(peak_lrs, step)
        for group in optimizer.param_groups:
            group["lr"] = lr_G[group["head"]]
        optimizer.step()
        optimizer.zero_grad()
        if schedule.is_epoch_end(step):
            yield
    return lambda features: predict_classes_per_head(features, logits, plan.cfg.batch.max_micro_size)


@contextmanager
def _seeded_init(plan: ProbePlan, kind: str) -> Iterator[None]:
    """Seed torch's global generator by the plan's seed and the probe kind; restore its state on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(plan.cfg.seed, "probe", kind))
        yield


@dataclass(frozen=True)
class _HeadSchedule:
    """Batches and learning rates of the heads. Each epoch is shuffled and drops its last incomplete batch."""

    plan: ProbePlan
    num_images: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_images // self.plan.cfg.batch.global_size)

    def is_epoch_end(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each step, from 0, and the positions of its images."""
        cfg, size = self.plan.cfg, self.plan.cfg.batch.global_size
        for epoch in range(cfg.epochs):
            order = draw_permutation(derive_key(cfg.seed, "probe order", epoch), self.num_images)
            for index in range(self.steps_per_epoch):
                yield epoch * self.steps_per_epoch + index, order[index * size : (index + 1) * size]

    def learning_rates(self, peak_lrs: Sequence[float], step: int) -> list[float]:
        """Return the learning rate of each head at a step."""
        cfg = self.plan.cfg
        return [
            warmup_cosine_lr(
                step,
                peak_lr=peak_lr * cfg.batch.global_size / 256,
                min_lr=cfg.optim.min_lr,
                warmup_steps=round(cfg.optim.warmup_epochs * self.steps_per_epoch),
                total_steps=cfg.epochs * self.steps_per_epoch,
            )
            for peak_lr in peak_lrs
        ]


def _sum_head_losses(logits_GBK: Tensor, labels_B: Tensor) -> Tensor:
    """Return the sum over heads of the mean cross-entropy: each head's gradient is that of its own loss."""
    labels = labels_B.repeat(len(logits_GBK))
    return F.cross_entropy(logits_GBK.float().flatten(0, 1), labels, reduction="sum") / len(labels_B)


def predict_classes_per_head(
    features: LayerFeatures, compute_logits: Callable[[Tensor], Tensor], batch_size: int
) -> Resumable[Tensor]:
    """Return the predicted classes, int64 [G, M], by logits [G, B, K] of batches."""
    predictions = []
    for start in range(0, len(features), batch_size):
        with torch.no_grad():
            predictions.append(compute_logits(features.load(slice(start, start + batch_size))).argmax(dim=2))
        yield
    return torch.cat(predictions, dim=1)
