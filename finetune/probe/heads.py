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

from finetune.probe.features import Part
from finetune.probe.plan import ProbePlan
from foveal.engines.base import autocast
from foveal.models.probes import AttentiveHead, linear_heads
from foveal.optim.optimizers import parameter_groups
from foveal.optim.schedule import warmup_cosine
from foveal.seeding import key, permutation

T = TypeVar("T")
Breaths = Generator[None, None, T]  # yields now and then, so that ranks can agree on going on
Guess = Callable[[Part], Breaths[Tensor]]  # the classes that each of G choices gives every image, int64 [G, M]

_MOMENTUM = 0.9
_TRUST, _EPSILON = 1e-3, 1e-8


def linear(plan: ProbePlan, train: Part) -> Breaths[Guess]:
    """Linear heads behind a batch norm without weights, by LARS without decay (He et al., 2022, appendix A.2)."""
    device, rates, course = train.labels.device, plan.probe.linear_lr_per_256, _Course(plan, len(train))
    width = train.rows.shape[-1]
    with _drawn(plan, "linear"):
        heads = [each.to(device).requires_grad_() for each in linear_heads(width, len(plan.classes), len(rates))]
    weight_GKF, bias_GK = heads
    moments = [torch.zeros_like(each) for each in heads]
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device)

    def logits(features_BF: Tensor) -> Tensor:
        return torch.einsum("bf,gkf->gbk", norm(features_BF), weight_GKF) + bias_GK[:, None]

    for step, rows in course.batches():
        slopes = torch.autograd.grad(_loss(logits(train.take(rows)), train.labels[rows]), heads)
        lr_G = torch.tensor(course.lr(rates, step), device=device)
        lars(weight_GKF.detach(), slopes[0], moments[0], lr_G)
        heavy_ball(bias_GK.detach(), slopes[1], moments[1], lr_G)
        if course.ends_epoch(step):
            yield
    norm.eval()
    return lambda part: guess(part, logits, plan.cfg.batch.at_once)


def lars(weights: Tensor, slopes: Tensor, moments: Tensor, lr: Tensor) -> None:
    """One update of each of G weights [G, ...] by its own rate [G], in place, without decay (You et al., 2017).

    A weight's rate is scaled by 1e-3 of its norm over that of its gradient; both are of that weight alone.
    """
    size_G, slope_G = weights.flatten(1).norm(dim=1), slopes.flatten(1).norm(dim=1)
    trust_G = torch.where((size_G > 0) & (slope_G > 0), _TRUST * size_G / (slope_G + _EPSILON), 1.0)
    heavy_ball(weights, slopes * _each(trust_G, weights), moments, lr)


def heavy_ball(weights: Tensor, slopes: Tensor, moments: Tensor, lr: Tensor) -> None:
    """One update with momentum of each of G weights [G, ...] by its own rate [G], in place."""
    moments.mul_(_MOMENTUM).add_(slopes)
    weights.sub_(moments * _each(lr, weights))


def _each(values_G: Tensor, weights: Tensor) -> Tensor:
    """Numbers [G] in the shape that multiplies weights [G, ...]."""
    return values_G.view(-1, *[1] * (weights.ndim - 1))


def attentive(plan: ProbePlan, train: Part) -> Breaths[Guess]:
    """One learned query over the patches and a linear head, by AdamW, for each rate."""
    optim, device, course = plan.cfg.optim, train.labels.device, _Course(plan, len(train))
    rates = plan.probe.attentive_lr_per_256
    heads, groups = [], []
    for number in range(len(rates)):
        with _drawn(plan, "attentive"):  # alike: heads differ in their rates alone
            heads.append(AttentiveHead(train.rows.shape[-1], plan.encoder["heads"], len(plan.classes)).to(device))
        mine = parameter_groups(heads[-1], optim, undecayed=("pool.latent",))
        groups += [group | {"head": number} for group in mine]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)

    def logits(patches_BLD: Tensor) -> Tensor:
        with autocast(device, plan.cfg.engine.precision):
            return torch.stack([head(patches_BLD) for head in heads])

    for step, rows in course.batches():
        _loss(logits(train.take(rows)), train.labels[rows]).backward()
        if optim.clip is not None:
            for head in heads:
                clip_grad_norm_(head.parameters(), optim.clip)
        lr_G = course.lr(rates, step)
        for group in optimizer.param_groups:
            group["lr"] = lr_G[group["head"]]
        optimizer.step()
        optimizer.zero_grad()
        if course.ends_epoch(step):
            yield
    return lambda part: guess(part, logits, plan.cfg.batch.at_once)


@contextmanager
def _drawn(plan: ProbePlan, kind: str) -> Iterator[None]:
    """Around drawing a head: what is drawn depends on the seed and the kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(plan.cfg.seed, "probe", kind))
        yield


@dataclass(frozen=True)
class _Course:
    """The steps over so many images. An epoch leaves out what fills no batch, others each time."""

    plan: ProbePlan
    images: int

    @property
    def per_epoch(self) -> int:
        return max(1, self.images // self.plan.cfg.batch.images)

    def ends_epoch(self, step: int) -> bool:
        return (step + 1) % self.per_epoch == 0

    def batches(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every step, from 0, and the positions of its images."""
        cfg, size = self.plan.cfg, self.plan.cfg.batch.images
        for epoch in range(cfg.epochs):
            order = permutation(key(cfg.seed, "probe order", epoch), self.images)
            for turn in range(self.per_epoch):
                yield epoch * self.per_epoch + turn, order[turn * size : (turn + 1) * size]

    def lr(self, rates: Sequence[float], step: int) -> list[float]:
        """The learning rate of every head at a step."""
        cfg = self.plan.cfg
        told = {"floor": cfg.optim.floor_lr, "total": cfg.epochs * self.per_epoch}
        told["warmup"] = round(cfg.optim.warmup_epochs * self.per_epoch)
        return [warmup_cosine(step, peak=rate * cfg.batch.images / 256, **told) for rate in rates]


def _loss(logits_GBK: Tensor, labels_B: Tensor) -> Tensor:
    """Every head's mean cross-entropy, added up: no head's gradient knows of another's."""
    labels = labels_B.repeat(len(logits_GBK))
    return F.cross_entropy(logits_GBK.float().flatten(0, 1), labels, reduction="sum") / len(labels_B)


def guess(part: Part, logits: Callable[[Tensor], Tensor], at_once: int) -> Breaths[Tensor]:
    """What the logits [G, B, K] of every image are highest for."""
    found = []
    for start in range(0, len(part), at_once):
        with torch.no_grad():
            found.append(logits(part.take(slice(start, start + at_once))).argmax(dim=2))
        yield
    return torch.cat(found, dim=1)
