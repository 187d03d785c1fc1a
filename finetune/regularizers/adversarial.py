"""Images changed a little, for the worst: adversarial training, and accuracy under attack. B images of C channels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.config import AdversarialConfig
from finetune.plan import FinetunePlan
from foveal.seeding import derive_key, draw_uniform


@dataclass(frozen=True)
class Attack:
    """Steps along the sign of the loss's gradient, inside a box around each image and inside what pixels can be.

    fgsm (Goodfellow et al., 2015): one step as long as the box. pgd (Madry et al., 2018): ``iterations`` steps, from a
    place in the box that depends on (seed, epoch, sample id). ``mean`` and ``std`` are those of normalised images.
    """

    cfg: AdversarialConfig
    seed: int
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, loss_fn: Callable[[Tensor], Tensor], images: Tensor, sample_keys_B: Tensor) -> Tensor:
        """Attacked images [B, C, H, W] of normalised ones; ``loss`` sums over images, each of which has its own part."""
        cfg, clean = self.cfg, images.detach()
        deviation = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        average = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        reach, stride = (part / 255 / deviation for part in (cfg.epsilon, cfg.step))
        lowest, highest = -average / deviation, (1 - average) / deviation
        low, high = torch.maximum(clean - reach, lowest), torch.minimum(clean + reach, highest)
        if cfg.kind == "fgsm":
            return self._gradient_step(loss_fn, clean, reach, low, high)
        noise = draw_uniform(derive_key(self.seed, "attack"), sample_keys_B, clean[0].numel()).view_as(clean)
        found = (low + noise * (high - low)).to(clean.dtype)
        for _ in range(cfg.iterations):
            found = self._gradient_step(loss_fn, found, stride, low, high)
        return found

    def _gradient_step(
        self, loss: Callable[[Tensor], Tensor], images: Tensor, stride: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            # Not autograd.grad, under which nobody can follow modules, as whoever counts operations does.
            torch.autograd.backward(loss(images), inputs=[images])
        assert images.grad is not None
        return torch.clamp(images.detach() + stride * images.grad.sign(), low, high)


def build_attack(plan: FinetunePlan) -> Attack | None:
    """The attack that the settings describe, if they do."""
    cfg = plan.cfg
    return None if cfg.adversarial is None else Attack(cfg.adversarial, cfg.seed, plan.mean, plan.std)
