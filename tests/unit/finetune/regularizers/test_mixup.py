"""Mixup, cutmix, class weights, teacher and attacks against references, independent of the split of a step."""

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
from finetune.regularizers.mixup import _sample_beta, apply_mixup_cutmix, mix_adjacent_pairs
from finetune.regularizers.teacher import TeacherLoss
from finetune.tasks.classify import ClassificationLoss
from finetune.tasks.multilabel import MultiLabelLoss
from foveal.data.batch import Batch
from foveal.models.batch_norm import (
    add_auxiliary_batch_norms,
    find_batch_norms,
    preserve_batch_norm_stats,
    use_auxiliary_batch_norms,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
B, K, SIDE = 8, 5, 12
SAMPLE_KEYS = torch.arange(B) * 7 + 1000


def random_images(seed: int = 0, count: int = B) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def batch(labels: list[int] | None = None, targets: Tensor | None = None) -> Batch:
    images = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    label_ids = torch.tensor(labels or [n % K for n in range(B)])
    return Batch(images, label_ids, SAMPLE_KEYS, SAMPLE_KEYS, torch.ones(B, dtype=torch.bool), 3, 0, 0, targets=targets)


def objective(
    loss_class: type[ClassificationLoss] = ClassificationLoss, weights: tuple[float, ...] = (1.0,) * K, **settings: Any
) -> ClassificationLoss:
    cfg_settings = {
        "seed": 5,
        "label_smoothing": 0.0,
        "random_erasing": 0.0,
        "random_erasing_boxes": "inside",
        "mixup": 0.0,
        "cutmix": 0.0,
        "mixup_switch_prob": 0.5,
    } | settings
    losses = {name: cfg_settings.pop(name) for name in ("attack", "teacher") if name in cfg_settings}
    cfg: Any = SimpleNamespace(**cfg_settings)
    return loss_class(cfg, MEAN, STD, 0, torch.tensor(weights), **losses)


class Linear(nn.Module):
    """Linear classifier, whose gradients have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(2)) / 20)

    def forward(self, images: Tensor, _noise: Tensor | None = None) -> Tensor:
        return images.flatten(1) @ self.weight.T


# Mixing


@pytest.mark.parametrize(("mixup", "cutmix", "switch_prob"), [(0.8, 0.0, 0.5), (0.0, 1.0, 0.5), (0.8, 1.0, 0.5)])
def test_a_mixed_image_is_its_own_share_and_its_neighbours(mixup: float, cutmix: float, switch_prob: float) -> None:
    images = random_images()
    mixed, own = apply_mixup_cutmix(images, SAMPLE_KEYS, 5, mixup=mixup, cutmix=cutmix, switch_prob=switch_prob)
    num_boxes = 0
    for row in range(B):
        partner = images[row ^ 1]
        unchanged = mixed[row] == images[row]
        if unchanged.all(dim=0).any() and not unchanged.all():  # cutmix: every pixel is from one of the two images
            assert ((mixed[row] == partner) | unchanged).all()
            assert own[row].item() == pytest.approx(unchanged.all(dim=0).float().mean().item(), abs=1e-6)
            rows, columns = (~unchanged.all(dim=0)).nonzero().T
            assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1), "it is one box"
            num_boxes += 1
        else:
            torch.testing.assert_close(mixed[row], own[row] * images[row] + (1 - own[row]) * partner)
    assert (num_boxes > 0) == (cutmix > 0)
    assert (num_boxes < B) == (mixup > 0)


def test_halves_of_a_step_are_mixed_as_the_whole_is() -> None:
    images, settings = random_images(), {"mixup": 0.8, "cutmix": 1.0, "switch_prob": 0.5}
    mixed, own = apply_mixup_cutmix(images, SAMPLE_KEYS, 5, **settings)
    for start, stop in itertools.pairwise((0, 2, 6, 8)):
        mixed_part, own_part = apply_mixup_cutmix(images[start:stop], SAMPLE_KEYS[start:stop], 5, **settings)
        assert torch.equal(mixed_part, mixed[start:stop])
        assert torch.equal(own_part, own[start:stop])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_weights_are_beta_distributed(alpha: float) -> None:
    from scipy import stats

    # float64: in float32 more than 1 % of Beta(0.2, 0.2) rounds to 1.
    numbers = torch.rand(20000, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert stats.kstest(_sample_beta(numbers, alpha).numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001


# The loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs(smoothing: float) -> None:
    weights, labels = (0.5, 2.0, 1.0, 0.0, 3.0), [0, 1, 2, 3, 4, -1, 1, 1]
    loss, model, inputs = objective(weights=weights, label_smoothing=smoothing), Linear(), batch(labels)
    total, metrics = loss(model, inputs)
    logits = model(loss.prepare_batch(inputs)[0])
    correct = [
        weights[label]
        for label, prediction in zip(labels, logits.argmax(dim=1).tolist(), strict=True)
        if label == prediction
    ]
    assert metrics["train_top1"].item() == pytest.approx(sum(correct))
    assert correct
    expected = F.cross_entropy(
        logits, inputs.labels, torch.tensor(weights), ignore_index=-1, label_smoothing=smoothing, reduction="mean"
    )
    assert (total / loss.batch_weight(inputs)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_several_classes_are_torchs_binary_cross_entropy() -> None:
    targets = (torch.rand(B, K, generator=torch.Generator().manual_seed(4)) < 0.4).to(torch.uint8)
    weights = (0.5, 2.0, 1.0, 0.0, 3.0)
    loss, model, inputs = objective(MultiLabelLoss, weights), Linear(), batch(targets=targets)
    total, _ = loss(model, inputs)
    logits = model(loss.prepare_batch(inputs)[0])
    expected = F.binary_cross_entropy_with_logits(logits, targets.float(), torch.tensor(weights))
    assert (total / loss.batch_weight(inputs)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_goals_are_mixed_as_images_are() -> None:
    loss, inputs = objective(mixup=0.8, cutmix=1.0, label_smoothing=0.1), batch()
    images, targets = loss.prepare_batch(inputs)
    _, own = apply_mixup_cutmix(
        objective().prepare_batch(inputs)[0], SAMPLE_KEYS, 5, mixup=0.8, cutmix=1.0, switch_prob=0.5
    )
    unmixed = 0.9 * F.one_hot(inputs.labels, K) + 0.1 / K
    for row in range(B):
        expected = own[row] * unmixed[row] + (1 - own[row]) * unmixed[row ^ 1]
        torch.testing.assert_close(targets[row], expected)
    model = Linear()
    total, _ = loss(model, inputs)
    torch.testing.assert_close(total, F.cross_entropy(model(images), targets, reduction="sum"))
    assert torch.equal(mix_adjacent_pairs(targets, torch.ones(B, 1)), targets)


def test_a_teacher_has_its_share() -> None:
    cfg: Any = SimpleNamespace(kind="soft", weight=0.3, temperature=2.0)
    teacher = Linear()
    teacher.weight.data.mul_(-1)
    loss, model, inputs = (
        objective(teacher=TeacherLoss(cfg, teacher, "fp32")),
        Linear(),
        batch([0, 1, -1, 3, 4, 0, 1, 2]),
    )
    total, metrics = loss(model, inputs)
    images, _ = loss.prepare_batch(inputs)
    labelled = inputs.labels >= 0
    student_log_probs, teacher_log_probs = (
        network(images).div(2.0).log_softmax(1)[labelled] for network in (model, teacher)
    )
    soft = 4 * (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum()
    label_loss = F.cross_entropy(model(images), inputs.labels, ignore_index=-1, reduction="sum")
    assert total.item() == pytest.approx((0.7 * label_loss + 0.3 * soft).item(), rel=1e-5)
    assert metrics["teacher_loss"].item() == pytest.approx(soft.item(), rel=1e-5)
    total.backward()
    assert teacher.weight.grad is None
    cfg.kind = "hard"
    teacher_classes = teacher(images).argmax(dim=1)
    expected = F.cross_entropy(model(images)[labelled], teacher_classes[labelled], reduction="sum")
    assert loss(model, inputs)[1]["teacher_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_token_learns_the_guess_and_the_class_the_labels() -> None:
    """DeiT, equation 3. On attacked images only the class token's logits count."""

    class WithToken(Linear):
        def forward(self, images: Tensor, _noise: Tensor | None = None) -> Any:
            logits = super().forward(images)
            return logits, 2 - logits

    cfg: Any = SimpleNamespace(kind="token", weight=0.3, temperature=2.0)
    teacher, model, inputs = Linear(), WithToken(), batch([0, 1, -1, 3, 4, 0, 1, 2])
    loss = objective(teacher=TeacherLoss(cfg, teacher, "fp32"))
    images, _ = loss.prepare_batch(inputs)
    labelled = inputs.labels >= 0
    logits, token = model(images)
    teacher_classes = teacher(images).argmax(dim=1)
    token_loss = F.cross_entropy(token[labelled], teacher_classes[labelled], reduction="sum")
    label_loss = F.cross_entropy(logits, inputs.labels, ignore_index=-1, reduction="sum")
    total, metrics = loss(model, inputs)
    assert total.item() == pytest.approx((0.7 * label_loss + 0.3 * token_loss).item(), rel=1e-5)
    assert metrics["train_top1"] == (logits.argmax(dim=1) == inputs.labels).sum()
    attacked_loss = objective(attack=attack(attack="fgsm", weight=0.5, epsilon=1e-6))
    total, metrics = attacked_loss(model, inputs)
    assert total.item() == pytest.approx(label_loss.item(), rel=1e-4)
    assert metrics["adversarial_top1"] == metrics["train_top1"]


# Attacks


def attack(**settings: Any) -> Attack:
    return Attack(AdversarialConfig(**settings), 5, MEAN, STD)


def test_fgsm_is_one_step_along_the_sign() -> None:
    model, inputs = Linear(), batch()
    images = objective().prepare_batch(inputs)[0]

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(model(images), inputs.labels, reduction="sum")

    attacked = attack(attack="fgsm", epsilon=8.0)(loss, images, SAMPLE_KEYS)
    logits = images.flatten(1).double() @ model.weight.detach().double().T
    gradient = ((logits.softmax(1) - F.one_hot(inputs.labels, K)) @ model.weight.detach().double()).view_as(images)
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (MEAN, STD))
    pixels = (images * std + mean + 8 / 255 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(attacked.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)
    assert model.weight.grad is None


def test_pgd_stays_in_its_box_gets_worse_and_knows_no_ranks() -> None:
    model, inputs = Linear(), batch()
    images = objective().prepare_batch(inputs)[0]

    def loss(batch_images: Tensor, rows: slice = slice(None)) -> Tensor:
        return F.cross_entropy(model(batch_images), inputs.labels[rows], reduction="sum")

    pgd = attack(epsilon=6.0, step_size=2.0, steps=6)
    attacked = pgd(loss, images, SAMPLE_KEYS)
    std = torch.tensor(STD).view(3, 1, 1)
    assert ((attacked - images).abs() * std * 255).max() <= 6.0 + 1e-3
    pixels = attacked * std + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert loss(attacked) > loss(attack(attack="fgsm", epsilon=6.0)(loss, images, SAMPLE_KEYS)) - 1e-3 > loss(images)
    attacked_part = pgd(lambda batch_images: loss(batch_images, slice(2, 5)), images[2:5], SAMPLE_KEYS[2:5])
    torch.testing.assert_close(attacked_part, attacked[2:5])


def test_attacked_images_have_their_share_of_the_loss() -> None:
    model, inputs = Linear(), batch()
    objective_with_attack = objective(attack=attack(epsilon=4.0, weight=0.25))
    total, metrics = objective_with_attack(model, inputs)
    clean, _ = objective()(model, inputs)
    assert total.item() == pytest.approx((0.75 * clean + 0.25 * metrics["adversarial_loss"]).item(), rel=1e-6)
    assert metrics["adversarial_loss"] > clean


def test_norms_of_attacked_images_are_others() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    twins = add_auxiliary_batch_norms(model)
    names = set(model.state_dict())
    clean, attacked = random_images(), random_images(9) + 3
    before = np.array([buffer.float().sum() for buffer in model.buffers()])
    with use_auxiliary_batch_norms(model, enabled=True):
        model(attacked)
    assert np.array_equal(before, [buffer.float().sum() for buffer in model.buffers()]), "the clean statistics changed"
    assert twins[0].running_mean.abs().sum() > 0  # type: ignore[operator, union-attr]
    model(clean)
    assert not torch.equal(twins[0].running_mean, model[1].running_mean)  # type: ignore[arg-type]
    running_mean = model[1].running_mean.clone()  # type: ignore[operator]
    with preserve_batch_norm_stats(model):
        model(attacked)
    assert torch.equal(running_mean, model[1].running_mean)  # type: ignore[arg-type]
    assert set(model.state_dict()) == names, "auxiliary norms are in the export"
    assert len(find_batch_norms(model)) == 1
