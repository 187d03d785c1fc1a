"""Mixup, cutmix, erasing and attacks: against loops, and the same however a step is dealt out."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.config import AdversarialConfig
from finetune.regularizers.adversarial import Attack
from finetune.regularizers.mixup import _sample_beta, apply_mixup_cutmix, apply_random_erasing, mix_with_partners
from finetune.regularizers.teacher import TeacherLoss
from finetune.tasks.classify import ClassificationLoss
from foveal.data import Batch
from foveal.models.batch_norm import (
    add_auxiliary_batch_norms,
    find_batch_norms,
    preserve_batch_norm_stats,
    use_auxiliary_batch_norms,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
B, K, SIDE = 8, 5, 12
DRAWS = torch.arange(B) * 7 + 1000


def pictures(seed: int = 0, count: int = B) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def batch(labels: list[int] | None = None, marks: Tensor | None = None) -> Batch:
    images = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    given = torch.tensor(labels or [n % K for n in range(B)])
    return Batch(images, given, DRAWS, DRAWS, torch.ones(B, dtype=torch.bool), 3, 0, 0, targets=marks)


def objective(kind: str = "class", weights: tuple[float, ...] = (1.0,) * K, **settings: Any) -> ClassificationLoss:
    told = {
        "seed": 5,
        "label_smoothing": 0.0,
        "erase": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "cutmix_share": 0.5,
    } | settings
    parts = {name: told.pop(name) for name in ("attack", "teacher") if name in told}
    cfg: Any = SimpleNamespace(data=SimpleNamespace(labels=kind), **told)
    return ClassificationLoss(cfg, MEAN, STD, 0, torch.tensor(weights), **parts)


class Linear(nn.Module):
    """A classifier whose gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(2)) / 20)

    def forward(self, images: Tensor, _noise: Tensor | None = None) -> Tensor:
        return images.flatten(1) @ self.weight.T


# Mixing


@pytest.mark.parametrize(("mixup", "cutmix", "share"), [(0.8, 0.0, 0.5), (0.0, 1.0, 0.5), (0.8, 1.0, 0.5)])
def test_a_mixed_image_is_its_own_share_and_its_neighbours(mixup: float, cutmix: float, share: float) -> None:
    images = pictures()
    found, own = apply_mixup_cutmix(images, DRAWS, 5, mixup=mixup, cutmix=cutmix, cutmix_share=share)
    boxes = 0
    for row in range(B):
        partner = images[row ^ 1]
        kept = found[row] == images[row]
        if kept.all(dim=0).any() and not kept.all():  # cutmix: every pixel is of one of both
            assert ((found[row] == partner) | kept).all()
            assert own[row].item() == pytest.approx(kept.all(dim=0).float().mean().item(), abs=1e-6)
            rows, columns = (~kept.all(dim=0)).nonzero().T
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1), "it is one box"
            boxes += 1
        else:
            torch.testing.assert_close(found[row], own[row] * images[row] + (1 - own[row]) * partner)
    assert (boxes > 0) == (cutmix > 0)
    assert (boxes < B) == (mixup > 0)


def test_halves_of_a_step_are_mixed_as_the_whole_is() -> None:
    images, how = pictures(), {"mixup": 0.8, "cutmix": 1.0, "cutmix_share": 0.5}
    whole, own = apply_mixup_cutmix(images, DRAWS, 5, **how)
    for start, stop in itertools.pairwise((0, 2, 6, 8)):
        part, mine = apply_mixup_cutmix(images[start:stop], DRAWS[start:stop], 5, **how)
        assert torch.equal(part, whole[start:stop])
        assert torch.equal(mine, own[start:stop])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_weights_are_beta_distributed(alpha: float) -> None:
    from scipy import stats

    # In double: in single precision more than a hundredth of Beta(0.2, 0.2) rounds to 1.
    numbers = torch.rand(20000, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stats.kstest(_sample_beta(numbers, alpha).numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_erasing_leaves_a_box_of_noise_in_as_many_images_as_it_should() -> None:
    draws, images = torch.arange(2000), torch.zeros(2000, 1, 16, 16)
    touched = apply_random_erasing(images, draws, 3, 0.25) != 0
    share = touched.flatten(1).any(dim=1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    areas = touched.flatten(1).float().mean(dim=1)
    assert 0.0 < areas[areas > 0].min() < 0.05
    assert 0.2 < areas.max() <= 0.45
    noise = apply_random_erasing(images, draws, 3, 1.0)[touched.expand(2000, 1, 16, 16)]
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(
        apply_random_erasing(images[5:9], draws[5:9], 3, 0.25), apply_random_erasing(images, draws, 3, 0.25)[5:9]
    )


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs(smoothing: float) -> None:
    weights, labels = (0.5, 2.0, 1.0, 0.0, 3.0), [0, 1, 2, 3, 4, -1, 1, 1]
    of, model, given = objective(weights=weights, label_smoothing=smoothing), Linear(), batch(labels)
    total, numbers = of(model, given)
    logits = model(of.prepare_batch(given)[0])
    right = [
        weights[label] for label, guess in zip(labels, logits.argmax(dim=1).tolist(), strict=True) if label == guess
    ]
    assert numbers["train_top1"].item() == pytest.approx(sum(right))
    assert right
    wanted = F.cross_entropy(
        logits, given.labels, torch.tensor(weights), ignore_index=-1, label_smoothing=smoothing, reduction="mean"
    )
    assert (total / of.batch_weight(given)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_several_classes_are_torchs_binary_cross_entropy() -> None:
    marks = (torch.rand(B, K, generator=torch.Generator().manual_seed(4)) < 0.4).to(torch.uint8)
    weights = (0.5, 2.0, 1.0, 0.0, 3.0)
    of, model, given = objective("classes", weights), Linear(), batch(marks=marks)
    total, _ = of(model, given)
    logits = model(of.prepare_batch(given)[0])
    wanted = F.binary_cross_entropy_with_logits(logits, marks.float(), torch.tensor(weights))
    assert (total / of.batch_weight(given)).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_goals_are_mixed_as_images_are() -> None:
    of, given = objective(mixup=0.8, cutmix=1.0, label_smoothing=0.1), batch()
    images, goals = of.prepare_batch(given)
    _, own = apply_mixup_cutmix(objective().prepare_batch(given)[0], DRAWS, 5, mixup=0.8, cutmix=1.0, cutmix_share=0.5)
    plain = 0.9 * F.one_hot(given.labels, K) + 0.1 / K
    for row in range(B):
        wanted = own[row] * plain[row] + (1 - own[row]) * plain[row ^ 1]
        torch.testing.assert_close(goals[row], wanted)
    model = Linear()
    total, _ = of(model, given)
    torch.testing.assert_close(total, F.cross_entropy(model(images), goals, reduction="sum"))
    assert torch.equal(mix_with_partners(goals, torch.ones(B, 1)), goals)


def test_a_teacher_has_its_share() -> None:
    cfg: Any = SimpleNamespace(kind="soft", weight=0.3, temperature=2.0)
    hers = Linear()
    hers.weight.data.mul_(-1)
    of, model, given = objective(teacher=TeacherLoss(cfg, hers, "fp32")), Linear(), batch([0, 1, -1, 3, 4, 0, 1, 2])
    total, numbers = of(model, given)
    images, _ = of.prepare_batch(given)
    known = given.labels >= 0
    his, told = (each(images).div(2.0).log_softmax(1)[known] for each in (model, hers))
    soft = 4 * (told.exp() * (told - his)).sum()
    plain = F.cross_entropy(model(images), given.labels, ignore_index=-1, reduction="sum")
    assert total.item() == pytest.approx((0.7 * plain + 0.3 * soft).item(), rel=1e-5)
    assert numbers["teacher_loss"].item() == pytest.approx(soft.item(), rel=1e-5)
    total.backward()
    assert hers.weight.grad is None
    cfg.kind = "hard"
    guess = hers(images).argmax(dim=1)
    wanted = F.cross_entropy(model(images)[known], guess[known], reduction="sum")
    assert of(model, given)[1]["teacher_loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_token_learns_the_guess_and_the_class_the_labels() -> None:
    """DeiT's equation 3; attacked images are classified by the class's logits alone."""

    class Two(Linear):
        def forward(self, images: Tensor, _noise: Tensor | None = None) -> Any:
            logits = super().forward(images)
            return logits, 2 - logits

    cfg: Any = SimpleNamespace(kind="token", weight=0.3, temperature=2.0)
    hers, model, given = Linear(), Two(), batch([0, 1, -1, 3, 4, 0, 1, 2])
    of = objective(teacher=TeacherLoss(cfg, hers, "fp32"))
    images, _ = of.prepare_batch(given)
    known = given.labels >= 0
    logits, token = model(images)
    guess = hers(images).argmax(dim=1)
    taught = F.cross_entropy(token[known], guess[known], reduction="sum")
    plain = F.cross_entropy(logits, given.labels, ignore_index=-1, reduction="sum")
    total, numbers = of(model, given)
    assert total.item() == pytest.approx((0.7 * plain + 0.3 * taught).item(), rel=1e-5)
    assert numbers["train_top1"] == (logits.argmax(dim=1) == given.labels).sum()
    still = objective(attack=attack(kind="fgsm", weight=0.5, epsilon=1e-6))
    total, numbers = still(model, given)
    assert total.item() == pytest.approx(plain.item(), rel=1e-4)
    assert numbers["adversarial_top1"] == numbers["train_top1"]


# Attacks


def attack(**settings: Any) -> Attack:
    return Attack(AdversarialConfig(**settings), 5, MEAN, STD)


def test_fgsm_is_one_step_along_the_sign() -> None:
    model, given = Linear(), batch()
    images = objective().prepare_batch(given)[0]

    def loss(seen: Tensor) -> Tensor:
        return F.cross_entropy(model(seen), given.labels, reduction="sum")

    found = attack(kind="fgsm", epsilon=8.0)(loss, images, DRAWS)
    logits = images.flatten(1).double() @ model.weight.detach().double().T
    slope = ((logits.softmax(1) - F.one_hot(given.labels, K)) @ model.weight.detach().double()).view_as(images)
    mean, std = (torch.tensor(each).double().view(3, 1, 1) for each in (MEAN, STD))
    pixels = (images * std + mean + 8 / 255 * slope.sign()).clamp(0, 1)
    torch.testing.assert_close(found.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)
    assert model.weight.grad is None


def test_pgd_stays_in_its_box_gets_worse_and_knows_no_ranks() -> None:
    model, given = Linear(), batch()
    images = objective().prepare_batch(given)[0]

    def loss(seen: Tensor, rows: slice = slice(None)) -> Tensor:
        return F.cross_entropy(model(seen), given.labels[rows], reduction="sum")

    pgd = attack(epsilon=6.0, step=2.0, iterations=6)
    found = pgd(loss, images, DRAWS)
    std = torch.tensor(STD).view(3, 1, 1)
    assert ((found - images).abs() * std * 255).max() <= 6.0 + 1e-3
    pixels = found * std + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert loss(found) > loss(attack(kind="fgsm", epsilon=6.0)(loss, images, DRAWS)) - 1e-3 > loss(images)
    part = pgd(lambda seen: loss(seen, slice(2, 5)), images[2:5], DRAWS[2:5])
    torch.testing.assert_close(part, found[2:5])


def test_attacked_images_have_their_share_of_the_loss() -> None:
    model, given = Linear(), batch()
    of = objective(attack=attack(epsilon=4.0, weight=0.25))
    total, numbers = of(model, given)
    plain, _ = objective()(model, given)
    assert total.item() == pytest.approx((0.75 * plain + 0.25 * numbers["adversarial_loss"]).item(), rel=1e-6)
    assert numbers["adversarial_loss"] > plain


def test_norms_of_attacked_images_are_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twins = add_auxiliary_batch_norms(model)
    names = set(model.state_dict())
    clean, attacked = pictures(), pictures(9) + 3
    before = np.array([b.float().sum() for b in model.buffers()])
    with use_auxiliary_batch_norms(model, enabled=True):
        model(attacked)
    assert np.array_equal(before, [b.float().sum() for b in model.buffers()]), "the clean statistics saw nothing"
    assert twins[0].running_mean.abs().sum() > 0  # type: ignore[operator, union-attr]
    model(clean)
    assert not torch.equal(twins[0].running_mean, model[1].running_mean)  # type: ignore[arg-type]
    kept = model[1].running_mean.clone()  # type: ignore[operator]
    with preserve_batch_norm_stats(model):
        model(attacked)
    assert torch.equal(kept, model[1].running_mean)  # type: ignore[arg-type]
    assert set(model.state_dict()) == names, "an export knows nothing of twins"
    assert len(find_batch_norms(model)) == 1
