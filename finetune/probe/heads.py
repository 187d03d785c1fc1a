"""Heads that learn by steps on kept features: linear ones by LARS, attentive ones by AdamW, all rates at once.

G rates, B images of a batch, M of a part, F numbers of a feature, K classes. A head's draws and its batches are keyed by
the seed, so the same features give the same heads.
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
from foveal.models.probes import AttentiveHead, init_linear_heads
from foveal.optim.optimizers import parameter_groups
from foveal.optim.schedule import warmup_cosine
from foveal.seeding import derive_key, draw_permutation

T = TypeVar("T")
Resumable = Generator[None, None, T]  # yields now and then, so that ranks can agree on going on
Predictor = Callable[
    [LayerFeatures], Resumable[Tensor]
]  # the classes that each of G choices gives every image, int64 [G, M]

_MOMENTUM = 0.9
_TRUST_COEFFICIENT, _EPSILON = 1e-3, 1e-8


def fit_linear_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """Linear heads behind a batch norm without weights, by LARS without decay (He et al., 2022, appendix A.2)."""
    device, rates, course = train.labels.device, plan.probe.linear_lr_per_256, _HeadSchedule(plan, len(train))
    width = train.memmap.shape[-1]
    with _seeded_init(plan, "linear"):
        heads = [each.to(device).requires_grad_() for each in init_linear_heads(width, len(plan.classes), len(rates))]
    weight_GKF, bias_GK = heads
    moments = [torch.zeros_like(each) for each in heads]
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device)

    def logits(features_BF: Tensor) -> Tensor:
        return torch.einsum("bf,gkf->gbk", norm(features_BF), weight_GKF) + bias_GK[:, None]

    for step, rows in course.batches():
        slopes = torch.autograd.grad(_sum_head_losses(logits(train.load(rows)), train.labels[rows]), heads)
        lr_G = torch.tensor(course.learning_rates(rates, step), device=device)
        lars_step(weight_GKF.detach(), slopes[0], moments[0], lr_G)
        momentum_step(bias_GK.detach(), slopes[1], moments[1], lr_G)
        if course.is_epoch_end(step):
            yield
    norm.eval()
    return lambda part: predict_classes(part, logits, plan.cfg.batch.at_once)


def lars_step(weights: Tensor, grads: Tensor, momentum_buffers: Tensor, lr: Tensor) -> None:
    """One update of each of G weights [G, ...] by its own rate [G], in place, without decay (You et al., 2017).

    A weight's rate is scaled by 1e-3 of its norm over that of its gradient; both are of that weight alone.
    """
    size_G, slope_G = weights.flatten(1).norm(dim=1), grads.flatten(1).norm(dim=1)
    trust_G = torch.where((size_G > 0) & (slope_G > 0), _TRUST_COEFFICIENT * size_G / (slope_G + _EPSILON), 1.0)
    momentum_step(weights, grads * _broadcast_per_head(trust_G, weights), momentum_buffers, lr)


def momentum_step(weights: Tensor, grads: Tensor, momentum_buffers: Tensor, lr: Tensor) -> None:
    """One update with momentum of each of G weights [G, ...] by its own rate [G], in place."""
    momentum_buffers.mul_(_MOMENTUM).add_(grads)
    weights.sub_(momentum_buffers * _broadcast_per_head(lr, weights))


def _broadcast_per_head(values_G: Tensor, weights: Tensor) -> Tensor:
    """Numbers [G] in the shape that multiplies weights [G, ...]."""
    return values_G.view(-1, *[1] * (weights.ndim - 1))


def fit_attentive_probe(plan: ProbePlan, train: LayerFeatures) -> Resumable[Predictor]:
    """One learned query over the patches and a linear head, by AdamW, for each rate."""
    optim, device, course = plan.cfg.optim, train.labels.device, _HeadSchedule(plan, len(train))
    rates = plan.probe.attentive_lr_per_256
    heads, groups = [], []
    for number in range(len(rates)):
        with _seeded_init(plan, "attentive"):  # alike: heads differ in their rates alone
            heads.append(AttentiveHead(train.memmap.shape[-1], plan.encoder["heads"], len(plan.classes)).to(device))
        mine = parameter_groups(heads[-1], optim, no_weight_decay=("pool.latent",))
        groups += [group | {"head": number} for group in mine]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)

    def logits(patches_BLD: Tensor) -> Tensor:
        with autocast(device, plan.cfg.engine.precision):
            return torch.stack([head(patches_BLD) for head in heads])

    for step, rows in course.batches():
        _sum_head_losses(logits(train.load(rows)), train.labels[rows]).backward()
        if optim.clip is not None:
            for head in heads:
                clip_grad_norm_(head.parameters(), optim.clip)
        lr_G = course.learning_rates(rates, step)
        for group in optimizer.param_groups:
            group["lr"] = lr_G[group["head"]]
        optimizer.step()
        optimizer.zero_grad()
        if course.is_epoch_end(step):
            yield
    return lambda part: predict_classes(part, logits, plan.cfg.batch.at_once)


@contextmanager
def _seeded_init(plan: ProbePlan, kind: str) -> Iterator[None]:
    """Around drawing a head: what is drawn depends on the seed and the kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(plan.cfg.seed, "probe", kind))
        yield


@dataclass(frozen=True)
class _HeadSchedule:
    """The steps over so many images. An epoch leaves out what fills no batch, others each time."""

    plan: ProbePlan
    num_images: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.num_images // self.plan.cfg.batch.images)

    def is_epoch_end(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every step, from 0, and the positions of its images."""
        cfg, size = self.plan.cfg, self.plan.cfg.batch.images
        for epoch in range(cfg.epochs):
            order = draw_permutation(derive_key(cfg.seed, "probe order", epoch), self.num_images)
            for turn in range(self.steps_per_epoch):
                yield epoch * self.steps_per_epoch + turn, order[turn * size : (turn + 1) * size]

    def learning_rates(self, peak_lrs: Sequence[float], step: int) -> list[float]:
        """The learning rate of every head at a step."""
        cfg = self.plan.cfg
        return [
            warmup_cosine(
                step,
                peak_lr=rate * cfg.batch.images / 256,
                min_lr=cfg.optim.floor_lr,
                warmup_steps=round(cfg.optim.warmup_epochs * self.steps_per_epoch),
                total_steps=cfg.epochs * self.steps_per_epoch,
            )
            for rate in peak_lrs
        ]


def _sum_head_losses(logits_GBK: Tensor, labels_B: Tensor) -> Tensor:
    """Every head's mean cross-entropy, added up: no head's gradient knows of another's."""
    labels = labels_B.repeat(len(logits_GBK))
    return F.cross_entropy(logits_GBK.float().flatten(0, 1), labels, reduction="sum") / len(labels_B)


def predict_classes(
    features: LayerFeatures, compute_logits: Callable[[Tensor], Tensor], batch_size: int
) -> Resumable[Tensor]:
    """What the logits [G, B, K] of every image are highest for."""
    found = []
    for start in range(0, len(features), batch_size):
        with torch.no_grad():
            found.append(compute_logits(features.load(slice(start, start + batch_size))).argmax(dim=2))
        yield
    return torch.cat(found, dim=1)
