"""Adversarial examples (FGSM, PGD) for training and for robust accuracy. B images of C channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config import AdversarialConfig
from finetune.plan import FinetunePlan
from foveal.seeding import derive_key, draw_uniform


@dataclass(frozen=True)
class Attack:
    """L-infinity attack: steps along the sign of the loss gradient, clipped to epsilon and to the valid pixel range.

    fgsm (Goodfellow et al., 2015): one step of length epsilon. pgd (Madry et al., 2018): ``iterations`` steps from a
    random start keyed by (seed, epoch, sample id). ``mean`` and ``std`` are the normalisation of the images.
    """

    cfg: AdversarialConfig
    seed: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, loss_sum_fn: Callable[[Tensor], Tensor], images: Tensor, sample_keys_B: Tensor) -> Tensor:
        """Return the attacked images [B, C, H, W] of normalised images.

        ``loss_fn`` returns the sum of per-image losses, so that each image's gradient is its own.
        """
        cfg, clean = self.cfg, images.detach()
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        epsilon, step_size = cfg.epsilon / 255 / std, cfg.step_size / 255 / std
        black, white = -mean / std, (1 - mean) / std
        low, high = torch.maximum(clean - epsilon, black), torch.minimum(clean + epsilon, white)
        if cfg.attack == "fgsm":
            return self._gradient_step(loss_sum_fn, clean, epsilon, low, high)
        noise = draw_uniform(derive_key(self.seed, "attack"), sample_keys_B, clean[0].numel()).view_as(clean)
        attacked = (low + noise * (high - low)).to(clean.dtype)
        for _ in range(cfg.steps):
            attacked = self._gradient_step(loss_sum_fn, attacked, step_size, low, high)
        return attacked

    def _gradient_step(
        self, loss_fn: Callable[[Tensor], Tensor], images: Tensor, step_size: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            # Not autograd.grad: a FLOP counter that hooks modules cannot follow it.
            torch.autograd.backward(loss_fn(images), inputs=[images])
        assert images.grad is not None
        return torch.clamp(images.detach() + step_size * images.grad.sign(), low, high)


def build_attack(plan: FinetunePlan) -> Attack | None:
    """Return the configured attack, or None."""
    cfg = plan.cfg
    return None if cfg.adversarial is None else Attack(cfg.adversarial, cfg.seed, plan.mean, plan.std)
