"""Losses of each stage against NumPy loops, gradients against finite differences, smoothing against torch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.config import DistillConfig
from distill.losses import DISTANCES, cosine_distance, l1_distance, smooth_l1_distance, unit_l1_distance
from distill.objective import DistillationLoss
from finetune.tasks.classify import ClassificationLoss
from finetune.tasks.classify_metrics import sum_batch_metrics
from foveal.data.batch import Batch
from foveal.models.config import MaskStrategy
from foveal.models.mae import MAEOutput
from foveal.models.masks import MASK_NOISE_FUNCTIONS, NUM_OFFSET_DRAWS
from foveal.models.students import Students
from foveal.seeding import derive_key, draw_uniform_numpy
from pretrain.config import PredictionTarget
from pretrain.objective import MaskedModelingLoss

MEAN, STD = (0.4,), (0.2,)
B, SIZE, PATCH = 3, 8, 4
L, P = (SIZE // PATCH) ** 2, PATCH * PATCH


def batch(labels: Sequence[int] = (2, -1, 0), epoch: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (B, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    ids = torch.tensor([11, 3, 500])
    return Batch(images, torch.tensor(labels), ids, ids + 1000 * epoch, torch.ones(B, dtype=torch.bool), 7, epoch, 0)


def pixels(images: Tensor) -> np.ndarray:
    return (images.numpy() / 255 - MEAN[0]) / STD[0]


class FixedOutput(nn.Module):
    """A model that returns fixed outputs and records its last inputs."""

    def __init__(self, *outputs: Tensor | MAEOutput) -> None:
        super().__init__()
        self.output: Any = outputs[0] if len(outputs) == 1 else outputs
        self.inputs: tuple[Any, ...] = ()

    def forward(self, *inputs: Any) -> Any:
        self.inputs = inputs
        return self.output


# Pretraining


def reconstruct(
    mask_ratio: float = 0.5, norm_pix: bool = False, masking: MaskStrategy = "random"
) -> MaskedModelingLoss:
    grid = (SIZE // PATCH, SIZE // PATCH)
    return MaskedModelingLoss(9, masking, mask_ratio, 2, norm_pix, PATCH, grid, MEAN, STD)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct_against_a_loop(norm_pix: bool) -> None:
    objective, data = reconstruct(norm_pix=norm_pix), batch()
    masked = torch.tensor([[0, 3], [2, 1], [3, 2]])
    pred = torch.randn(B, 2, P, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model = FixedOutput(MAEOutput(pred, masked))
    total, metrics = objective(model, data)
    assert metrics == {}

    by_loop, gradient = 0.0, np.zeros((B, 2, P))
    values = pred.detach().double().numpy()
    for image, normal in enumerate(pixels(data.images)):
        for slot, place in enumerate(masked[image].tolist()):
            top, left = place // 2 * PATCH, place % 2 * PATCH
            target = np.array([normal[0, top + y, left + x] for y in range(PATCH) for x in range(PATCH)])
            if norm_pix:
                mean = sum(target) / P
                target = (target - mean) / math.sqrt(sum((target - mean) ** 2) / (P - 1) + 1e-6)
            for number in range(P):
                error = values[image, slot, number] - target[number]
                by_loop += error**2 / P
                gradient[image, slot, number] = 2 * error / P
    assert total.item() == pytest.approx(by_loop, rel=1e-5)
    total.backward()
    assert pred.grad is not None
    np.testing.assert_allclose(pred.grad.numpy(), gradient, rtol=1e-4, atol=1e-5)

    images, noise, ratio = model.inputs
    np.testing.assert_allclose(images.numpy(), pixels(data.images), rtol=1e-5, atol=1e-6)
    assert ratio == 0.5
    assert np.array_equal(noise.numpy(), draw_uniform_numpy(derive_key(9, "mask"), np.array([4011, 4003, 4500]), L))


def by_hand(pred: np.ndarray, target: np.ndarray, *, huber: bool) -> tuple[float, np.ndarray]:
    """The loss of a prediction [D] of features [D], which are standardised first, and its gradient."""
    width = len(target)
    mean = sum(target) / width
    scale = math.sqrt(sum((target - mean) ** 2) / width + 1e-5)
    error = pred - (target - mean) / scale
    quadratic = (abs(error) < 1) | (not huber)
    loss = np.where(quadratic, error**2 * (0.5 if huber else 1.0), abs(error) - 0.5)
    slope = np.where(quadratic, error * (1.0 if huber else 2.0), np.sign(error))
    return float(sum(loss)) / width, slope / width


@pytest.mark.parametrize("target", ["pixels", "features"])
def test_features_of_patches_and_of_the_image_against_loops(target: PredictionTarget) -> None:
    width, weight, draw = 6, 0.3, torch.Generator().manual_seed(2)
    masked = torch.tensor([[0, 3], [2, 1], [3, 2]])
    features = 3 * torch.randn(B, L, width, generator=draw) + 1
    patches = torch.randn(B, 2, P if target == "pixels" else width, generator=draw, requires_grad=True)
    image = torch.randn(B, width, generator=draw, requires_grad=True)
    objective = replace(reconstruct(), target=target, image_loss_weight=weight)
    total, metrics = objective(FixedOutput(MAEOutput(patches, masked, image, features)), batch())
    total.backward()
    assert image.grad is not None
    assert patches.grad is not None

    image_sum = 0.0
    for number in range(B):
        pred, mean_feature = image[number].detach().double().numpy(), features[number].double().numpy().mean(0)
        loss, slope = by_hand(pred, mean_feature, huber=False)
        image_sum += 2 * loss  # two masked patches per image
        np.testing.assert_allclose(image.grad[number].numpy(), 2 * weight * slope, rtol=1e-4, atol=1e-6)
    assert metrics["image_loss"].item() == pytest.approx(image_sum, rel=1e-5)
    assert total.item() == pytest.approx(metrics["patch_loss"].item() + weight * image_sum, rel=1e-5)
    if target == "pixels":
        plain, _ = reconstruct()(FixedOutput(MAEOutput(patches, masked)), batch())
        assert metrics["patch_loss"].item() == plain.item()
        return
    by_loop = 0.0
    for number in range(B):
        for slot, place in enumerate(masked[number].tolist()):
            pred, feature = patches[number, slot].detach().double().numpy(), features[number, place].double().numpy()
            loss, slope = by_hand(pred, feature, huber=True)
            by_loop += loss
            np.testing.assert_allclose(patches.grad[number, slot].numpy(), slope, rtol=1e-4, atol=1e-6)
    assert metrics["patch_loss"].item() == pytest.approx(by_loop, rel=1e-5)


def test_the_weight_is_the_number_of_masked_patches() -> None:
    assert reconstruct(0.5).batch_weight(batch()) == B * 2
    assert reconstruct(0.75).batch_weight(batch()) == B * 3
    assert reconstruct(0.7).batch_weight(batch()) == B * 3  # one patch stays visible, as in the model


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_masking_is_made_of_the_same_numbers(masking: MaskStrategy) -> None:
    rows = draw_uniform_numpy(derive_key(9, "mask"), np.array([4011, 4003, 4500]), L + NUM_OFFSET_DRAWS)
    noise = reconstruct(masking=masking).draw_mask_noise(batch())
    assert noise.equal(MASK_NOISE_FUNCTIONS[masking](torch.from_numpy(rows), 2, 2, 2))


def test_another_epoch_masks_other_patches_and_another_neighbour_does_not() -> None:
    noise = reconstruct().draw_mask_noise(batch())
    assert not noise.equal(reconstruct().draw_mask_noise(batch(epoch=5)))
    data = batch()
    row = slice(1, 2)
    single = Batch(data.images[row], data.labels[row], data.ids[row], data.sample_keys[row], data.valid[row], 7, 4, 1)
    assert reconstruct().draw_mask_noise(single).equal(noise[1:2])


# Distillation


def by_loop(name: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """The distance of two vectors, in plain arithmetic."""
    if name == "cosine":
        dot = sum(a * b for a, b in zip(student, teacher, strict=True))
        return 1 - dot / (math.sqrt(sum(a * a for a in student)) * math.sqrt(sum(b * b for b in teacher)))
    if name == "unit_l1":
        student, teacher = (vector / math.sqrt(sum(each * each for each in vector)) for vector in (student, teacher))
    errors = [abs(a - b) for a, b in zip(student, teacher, strict=True)]
    if name in {"l1", "unit_l1"}:
        return sum(errors) / len(errors)
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in errors) / len(errors)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_and_their_gradients_against_loops(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = 2 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    distances = DISTANCES[name](student, teacher)  # pyright: ignore[reportArgumentType]
    assert distances.shape == (4,)
    expected = [by_loop(name, a, b) for a, b in zip(student.detach().numpy(), teacher.numpy(), strict=True)]
    assert distances.tolist() == pytest.approx(expected, rel=1e-9)

    distances.sum().backward()
    assert student.grad is not None
    epsilon = 1e-6
    for row in range(4):
        for column in range(6):
            up, down = student.detach().numpy().copy(), student.detach().numpy().copy()
            up[row, column] += epsilon
            down[row, column] -= epsilon
            slope = (by_loop(name, up[row], teacher.numpy()[row]) - by_loop(name, down[row], teacher.numpy()[row])) / 2
            assert student.grad[row, column].item() == pytest.approx(slope / epsilon, rel=1e-5, abs=1e-8)


def test_a_perfect_answer_is_at_no_distance() -> None:
    target = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert cosine_distance(target * 7, target).abs().max() < 1e-6
    assert smooth_l1_distance(target, target).abs().max() == 0
    assert l1_distance(target, target).abs().max() == 0
    assert unit_l1_distance(target * 7, target).abs().max() < 1e-6
    assert cosine_distance(-target, target).sub(2).abs().max() < 1e-6


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("cls_weight", "patch_weight"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_imitate_against_a_loop(name: str, cls_weight: float, patch_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher_outputs = (torch.randn(B, 5, generator=generator), torch.randn(B, L, 5, generator=generator))
    student_outputs = (torch.randn(B, 5, generator=generator), torch.randn(B, L, 5, generator=generator))
    teacher, student = FixedOutput(*teacher_outputs), FixedOutput(*student_outputs)
    cfg = DistillConfig.from_dict(
        {"distance": name, "cls_weight": cls_weight, "patch_weight": patch_weight}
        | {
            "teacher": "x",
            "epochs": 1,
            "data": {"path": "x", "image_size": SIZE},
            "batch": {"global_size": B},
            "optim": {},
        },
        "here",
    )
    objective = DistillationLoss(teacher, cfg, [""], MEAN, STD)  # pyright: ignore[reportArgumentType]
    total, metrics = objective(Students([student]), batch())

    (student_cls, student_patches), (teacher_cls, teacher_patches) = (
        [output.numpy() for output in outputs] for outputs in (student_outputs, teacher_outputs)
    )
    cls = [by_loop(name, student_cls[image], teacher_cls[image]) for image in range(B)]
    patches = [
        sum(by_loop(name, student_patches[image, at], teacher_patches[image, at]) for at in range(L)) / L
        for image in range(B)
    ]
    assert total.item() == pytest.approx(
        sum(cls_weight * c + patch_weight * p for c, p in zip(cls, patches, strict=True)), rel=1e-5
    )
    assert metrics["cls_distance"].item() == pytest.approx(sum(cls), rel=1e-5)
    if patch_weight:
        assert metrics["patch_distance"].item() == pytest.approx(sum(patches), rel=1e-5)
    assert objective.batch_weight(batch()) == B
    (teacher_images, _), (student_images, *_) = teacher.inputs, student.inputs
    assert teacher_images is student_images, "teacher and student share one view"
    np.testing.assert_allclose(teacher_images.numpy(), pixels(batch().images), rtol=1e-5, atol=1e-6)


# Fine-tuning


def cross_entropy(logits: np.ndarray, label: int, smoothing: float) -> float:
    """Cross-entropy of one image in plain arithmetic; the target is 1 - smoothing at the label plus smoothing / K."""
    log_sum = math.log(sum(math.exp(value) for value in logits))
    classes = len(logits)
    target = [smoothing / classes + (1 - smoothing) * (index == label) for index in range(classes)]
    return -sum(probability * (value - log_sum) for probability, value in zip(target, logits, strict=True))


def classify(seed: int = 0, smoothing: float = 0.0, sites: int = 0, classes: int = 4) -> ClassificationLoss:
    off = {"random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
    cfg: Any = SimpleNamespace(seed=seed, label_smoothing=smoothing, **off)
    return ClassificationLoss(cfg, MEAN, STD, sites, torch.ones(classes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_classify_against_a_loop_and_torch(smoothing: float) -> None:
    logits = torch.randn(B, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model, data = FixedOutput(logits), batch((2, -1, 0))
    total, metrics = classify(9, smoothing, 2)(model, data)
    values = logits.detach().double().numpy()
    by_hand = sum(cross_entropy(values[image], label, smoothing) for image, label in ((0, 2), (2, 0)))
    assert total.item() == pytest.approx(by_hand, rel=1e-5)
    labelled = torch.tensor([True, False, True])
    mean = nn.functional.cross_entropy(logits[labelled], data.labels[labelled], label_smoothing=smoothing)
    assert total.item() / 2 == pytest.approx(mean.item(), rel=1e-6)

    total.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().max() == 0, "an image without a label has no gradient"
    soft = torch.tensor(values).softmax(dim=1)
    target = torch.full((B, 4), smoothing / 4).double()
    target[0, 2] += 1 - smoothing
    target[2, 0] += 1 - smoothing
    torch.testing.assert_close(logits.grad[labelled].double(), (soft - target)[labelled], rtol=1e-5, atol=1e-6)

    _, drops = model.inputs
    assert np.array_equal(
        drops.numpy(), draw_uniform_numpy(derive_key(9, "drop path"), np.array([4011, 4003, 4500]), 2)
    )
    assert set(metrics) == {"train_top1"}


def test_the_weight_is_the_number_of_labelled_images() -> None:
    objective = classify()
    assert [int(objective.batch_weight(batch(labels))) for labels in ((2, -1, 0), (-1, -1, -1), (1, 1, 1))] == [2, 0, 3]


def test_train_top1_is_the_count_of_right_guesses() -> None:
    logits = torch.eye(4)[[2, 1, 3]]
    _, metrics = classify()(FixedOutput(logits), batch((2, 0, 3)))
    assert metrics["train_top1"].item() == 2


def test_hits_counts_every_labelled_image_once_and_padding_nowhere() -> None:
    """Six classes; rows: right at first, right at fifth, right at sixth, unlabelled, padding, padding with a label."""
    ranking = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])  # class 0 first, class 5 last
    logits = ranking.repeat(6, 1)
    labels = torch.tensor([0, 4, 5, -1, -1, 0])
    valid = torch.tensor([True, True, True, True, False, False])
    top1, top5, loss, images = sum_batch_metrics(logits, labels, valid).tolist()
    assert (top1, top5, images) == (1.0, 2.0, 3.0)
    assert loss == pytest.approx(sum(cross_entropy(ranking.numpy(), label, 0.0) for label in (0, 4, 5)), rel=1e-6)


def test_hits_of_fewer_than_five_classes_and_of_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    sums = sum_batch_metrics(logits, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool))
    assert sums.dtype == torch.float64
    assert sums.tolist()[:2] == [1.0, 3.0]
    assert sum_batch_metrics(logits, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 4


def test_hits_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, generator=generator)
    labels = torch.randint(-1, 7, (20,), generator=generator)
    valid = torch.rand(20, generator=generator) < 0.7
    rows = [slice(start, start + 3) for start in range(0, 20, 3)]
    total = torch.stack([sum_batch_metrics(logits[part], labels[part], valid[part]) for part in rows]).sum(dim=0)
    torch.testing.assert_close(total, sum_batch_metrics(logits, labels, valid))
    counted = valid & (labels >= 0)
    ranking = logits.argsort(dim=1, descending=True)
    assert total.tolist()[0] == sum(int(ranking[i, 0] == labels[i]) for i in range(20) if counted[i])
    assert total.tolist()[1] == sum(int(labels[i] in ranking[i, :5]) for i in range(20) if counted[i])
    assert total.tolist()[3] == int(counted.sum())
