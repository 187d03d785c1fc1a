"""What each stage learns, against loops in NumPy; gradients against finite differences; smoothing against torch."""

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
from distill.losses import DISTANCES, cosine_distance, l1_distance, smooth_l1_distance
from distill.objective import DistillationLoss
from finetune.tasks.classify import ClassificationLoss, sum_batch_metrics
from foveal.data import Batch
from foveal.models.mae import MAEOutput
from foveal.models.masks import MASK_NOISE_FUNCTIONS, NUM_OFFSET_DRAWS, MaskStrategy
from foveal.models.students import Students
from foveal.seeding import derive_key, draw_uniform_numpy
from pretrain.objective import MaskedModelingLoss, PredictionTarget

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


class Given(nn.Module):
    """A model that answers what it was told to, and remembers what it was asked."""

    def __init__(self, *answers: Tensor | MAEOutput) -> None:
        super().__init__()
        self.answer: Any = answers[0] if len(answers) == 1 else answers
        self.asked: tuple[Any, ...] = ()

    def forward(self, *asked: Any) -> Any:
        self.asked = asked
        return self.answer


# Pretraining


def reconstruct(
    mask_ratio: float = 0.5, norm_pix: bool = False, masking: MaskStrategy = "random"
) -> MaskedModelingLoss:
    grid = (SIZE // PATCH, SIZE // PATCH)
    return MaskedModelingLoss(9, masking, mask_ratio, 2, norm_pix, PATCH, grid, MEAN, STD)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct_against_a_loop(norm_pix: bool) -> None:
    objective, given = reconstruct(norm_pix=norm_pix), batch()
    masked = torch.tensor([[0, 3], [2, 1], [3, 2]])
    pred = torch.randn(B, 2, P, generator=torch.Generator().manual_seed(1), requires_grad=True)
    model = Given(MAEOutput(pred, masked))
    total, numbers = objective(model, given)
    assert numbers == {}

    by_loop, gradient = 0.0, np.zeros((B, 2, P))
    values = pred.detach().double().numpy()
    for image, normal in enumerate(pixels(given.images)):
        for slot, place in enumerate(masked[image].tolist()):
            top, left = place // 2 * PATCH, place % 2 * PATCH
            wanted = np.array([normal[0, top + y, left + x] for y in range(PATCH) for x in range(PATCH)])
            if norm_pix:
                mean = sum(wanted) / P
                wanted = (wanted - mean) / math.sqrt(sum((wanted - mean) ** 2) / (P - 1) + 1e-6)
            for number in range(P):
                apart = values[image, slot, number] - wanted[number]
                by_loop += apart**2 / P
                gradient[image, slot, number] = 2 * apart / P
    assert total.item() == pytest.approx(by_loop, rel=1e-5)
    total.backward()
    assert pred.grad is not None
    np.testing.assert_allclose(pred.grad.numpy(), gradient, rtol=1e-4, atol=1e-5)

    images, noise, ratio = model.asked
    np.testing.assert_allclose(images.numpy(), pixels(given.images), rtol=1e-5, atol=1e-6)
    assert ratio == 0.5
    assert np.array_equal(noise.numpy(), draw_uniform_numpy(derive_key(9, "mask"), np.array([4011, 4003, 4500]), L))


def by_hand(answer: np.ndarray, lesson: np.ndarray, *, huber: bool) -> tuple[float, np.ndarray]:
    """The error of one guess [D] of features [D], which are standardised first, and its gradient."""
    width = len(lesson)
    middle = sum(lesson) / width
    scale = math.sqrt(sum((lesson - middle) ** 2) / width + 1e-5)
    apart = answer - (lesson - middle) / scale
    near = (abs(apart) < 1) | (not huber)
    error = np.where(near, apart**2 * (0.5 if huber else 1.0), abs(apart) - 0.5)
    slope = np.where(near, apart * (1.0 if huber else 2.0), np.sign(apart))
    return float(sum(error)) / width, slope / width


@pytest.mark.parametrize("target", ["pixels", "latents"])
def test_features_of_patches_and_of_the_image_against_loops(target: PredictionTarget) -> None:
    width, weight, draw = 6, 0.3, torch.Generator().manual_seed(2)
    masked = torch.tensor([[0, 3], [2, 1], [3, 2]])
    seen = 3 * torch.randn(B, L, width, generator=draw) + 1
    patches = torch.randn(B, 2, P if target == "pixels" else width, generator=draw, requires_grad=True)
    image = torch.randn(B, width, generator=draw, requires_grad=True)
    objective = replace(reconstruct(), target=target, image_weight=weight)
    total, numbers = objective(Given(MAEOutput(patches, masked, image, seen)), batch())
    total.backward()
    assert image.grad is not None
    assert patches.grad is not None

    whole = 0.0
    for number in range(B):
        answer, lesson = image[number].detach().double().numpy(), seen[number].double().numpy().mean(0)
        error, slope = by_hand(answer, lesson, huber=False)
        whole += 2 * error  # two masked patches an image
        np.testing.assert_allclose(image.grad[number].numpy(), 2 * weight * slope, rtol=1e-4, atol=1e-6)
    assert numbers["image_loss"].item() == pytest.approx(whole, rel=1e-5)
    assert total.item() == pytest.approx(numbers["patch_loss"].item() + weight * whole, rel=1e-5)
    if target == "pixels":
        plain, _ = reconstruct()(Given(MAEOutput(patches, masked)), batch())
        assert numbers["patch_loss"].item() == plain.item()
        return
    by_loop = 0.0
    for number in range(B):
        for slot, place in enumerate(masked[number].tolist()):
            answer, lesson = patches[number, slot].detach().double().numpy(), seen[number, place].double().numpy()
            error, slope = by_hand(answer, lesson, huber=True)
            by_loop += error
            np.testing.assert_allclose(patches.grad[number, slot].numpy(), slope, rtol=1e-4, atol=1e-6)
    assert numbers["patch_loss"].item() == pytest.approx(by_loop, rel=1e-5)


def test_the_weight_is_the_number_of_masked_patches() -> None:
    assert reconstruct(0.5).batch_weight(batch()) == B * 2
    assert reconstruct(0.75).batch_weight(batch()) == B * 3
    assert reconstruct(0.7).batch_weight(batch()) == B * 3  # one patch stays, as in the model


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_masking_is_made_of_the_same_numbers(masking: MaskStrategy) -> None:
    rows = draw_uniform_numpy(derive_key(9, "mask"), np.array([4011, 4003, 4500]), L + NUM_OFFSET_DRAWS)
    noise = reconstruct(masking=masking).draw_mask_noise(batch())
    assert noise.equal(MASK_NOISE_FUNCTIONS[masking](torch.from_numpy(rows), 2, 2, 2))


def test_another_epoch_masks_other_patches_and_another_neighbour_does_not() -> None:
    noise = reconstruct().draw_mask_noise(batch())
    assert not noise.equal(reconstruct().draw_mask_noise(batch(epoch=5)))
    given = batch()
    row = slice(1, 2)
    alone = Batch(
        given.images[row], given.labels[row], given.ids[row], given.sample_keys[row], given.valid[row], 7, 4, 1
    )
    assert reconstruct().draw_mask_noise(alone).equal(noise[1:2])


# Distillation


def by_loop(name: str, answer: np.ndarray, lesson: np.ndarray) -> float:
    """The distance of two vectors, in plain arithmetic."""
    if name == "cosine":
        dot = sum(a * b for a, b in zip(answer, lesson, strict=True))
        return 1 - dot / (math.sqrt(sum(a * a for a in answer)) * math.sqrt(sum(b * b for b in lesson)))
    apart = [abs(a - b) for a, b in zip(answer, lesson, strict=True)]
    if name == "l1":
        return sum(apart) / len(apart)
    return sum(0.5 * d * d if d < 1 else d - 0.5 for d in apart) / len(apart)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_and_their_gradients_against_loops(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    answer = (2 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    lesson = 2 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    apart = DISTANCES[name](answer, lesson)  # pyright: ignore[reportArgumentType]
    assert apart.shape == (4,)
    expected = [by_loop(name, a, b) for a, b in zip(answer.detach().numpy(), lesson.numpy(), strict=True)]
    assert apart.tolist() == pytest.approx(expected, rel=1e-9)

    apart.sum().backward()
    assert answer.grad is not None
    small = 1e-6
    for row in range(4):
        for column in range(6):
            up, down = answer.detach().numpy().copy(), answer.detach().numpy().copy()
            up[row, column] += small
            down[row, column] -= small
            slope = (by_loop(name, up[row], lesson.numpy()[row]) - by_loop(name, down[row], lesson.numpy()[row])) / 2
            assert answer.grad[row, column].item() == pytest.approx(slope / small, rel=1e-5, abs=1e-8)


def test_a_perfect_answer_is_at_no_distance() -> None:
    lesson = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert cosine_distance(lesson * 7, lesson).abs().max() < 1e-6
    assert smooth_l1_distance(lesson, lesson).abs().max() == 0
    assert l1_distance(lesson, lesson).abs().max() == 0
    assert cosine_distance(-lesson, lesson).sub(2).abs().max() < 1e-6


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(("cls_weight", "patch_weight"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_imitate_against_a_loop(name: str, cls_weight: float, patch_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    lesson = (torch.randn(B, 5, generator=generator), torch.randn(B, L, 5, generator=generator))
    answer = (torch.randn(B, 5, generator=generator), torch.randn(B, L, 5, generator=generator))
    teacher, pupil = Given(*lesson), Given(*answer)
    cfg = DistillConfig.from_dict(
        {"distance": name, "cls_weight": cls_weight, "patch_weight": patch_weight}
        | {"teacher": "x", "epochs": 1, "data": {"path": "x", "image_size": SIZE}, "batch": {"images": B}, "optim": {}},
        "here",
    )
    objective = DistillationLoss(teacher, cfg, [""], MEAN, STD)  # pyright: ignore[reportArgumentType]
    total, numbers = objective(Students([pupil]), batch())

    cls = [by_loop(name, answer[0][image].numpy(), lesson[0][image].numpy()) for image in range(B)]
    patches = [
        sum(by_loop(name, answer[1][image, place].numpy(), lesson[1][image, place].numpy()) for place in range(L)) / L
        for image in range(B)
    ]
    assert total.item() == pytest.approx(
        sum(cls_weight * c + patch_weight * p for c, p in zip(cls, patches, strict=True)), rel=1e-5
    )
    assert numbers["cls_distance"].item() == pytest.approx(sum(cls), rel=1e-5)
    if patch_weight:
        assert numbers["patch_distance"].item() == pytest.approx(sum(patches), rel=1e-5)
    assert objective.batch_weight(batch()) == B
    (seen, _), (shown, *_) = teacher.asked, pupil.asked
    assert seen is shown, "one view for both"
    np.testing.assert_allclose(seen.numpy(), pixels(batch().images), rtol=1e-5, atol=1e-6)


# Fine-tuning


def cross_entropy(logits: np.ndarray, label: int, smoothing: float) -> float:
    """Of one image, in plain arithmetic: the target has 1 - smoothing at the label and smoothing / K everywhere."""
    whole = math.log(sum(math.exp(value) for value in logits))
    classes = len(logits)
    target = [smoothing / classes + (1 - smoothing) * (place == label) for place in range(classes)]
    return -sum(share * (value - whole) for share, value in zip(target, logits, strict=True))


def classify(seed: int = 0, smoothing: float = 0.0, sites: int = 0, classes: int = 4) -> ClassificationLoss:
    off = {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    cfg: Any = SimpleNamespace(seed=seed, label_smoothing=smoothing, data=SimpleNamespace(labels="class"), **off)
    return ClassificationLoss(cfg, MEAN, STD, sites, torch.ones(classes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_classify_against_a_loop_and_torch(smoothing: float) -> None:
    logits = torch.randn(B, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    model, given = Given(logits), batch((2, -1, 0))
    total, numbers = classify(9, smoothing, 2)(model, given)
    values = logits.detach().double().numpy()
    by_hand = sum(cross_entropy(values[image], label, smoothing) for image, label in ((0, 2), (2, 0)))
    assert total.item() == pytest.approx(by_hand, rel=1e-5)
    labelled = torch.tensor([True, False, True])
    mean = nn.functional.cross_entropy(logits[labelled], given.labels[labelled], label_smoothing=smoothing)
    assert total.item() / 2 == pytest.approx(mean.item(), rel=1e-6)

    total.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().max() == 0, "an image without a label teaches nothing"
    soft = torch.tensor(values).softmax(dim=1)
    target = torch.full((B, 4), smoothing / 4).double()
    target[0, 2] += 1 - smoothing
    target[2, 0] += 1 - smoothing
    torch.testing.assert_close(logits.grad[labelled].double(), (soft - target)[labelled], rtol=1e-5, atol=1e-6)

    _, drops = model.asked
    assert np.array_equal(
        drops.numpy(), draw_uniform_numpy(derive_key(9, "drop path"), np.array([4011, 4003, 4500]), 2)
    )
    assert set(numbers) == {"train_top1"}


def test_the_weight_is_the_number_of_labelled_images() -> None:
    objective = classify()
    assert [int(objective.batch_weight(batch(labels))) for labels in ((2, -1, 0), (-1, -1, -1), (1, 1, 1))] == [2, 0, 3]


def test_train_top1_is_the_count_of_right_guesses() -> None:
    logits = torch.eye(4)[[2, 1, 3]]
    _, numbers = classify()(Given(logits), batch((2, 0, 3)))
    assert numbers["train_top1"].item() == 2


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
    found = sum_batch_metrics(logits, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.bool))
    assert found.dtype == torch.float64
    assert found.tolist()[:2] == [1.0, 3.0]
    assert sum_batch_metrics(logits, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 4


def test_hits_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 7, generator=generator)
    labels = torch.randint(-1, 7, (20,), generator=generator)
    valid = torch.rand(20, generator=generator) < 0.7
    each = [sum_batch_metrics(logits[at : at + 3], labels[at : at + 3], valid[at : at + 3]) for at in range(0, 20, 3)]
    parts = torch.stack(each).sum(dim=0)
    torch.testing.assert_close(parts, sum_batch_metrics(logits, labels, valid))
    known = valid & (labels >= 0)
    guesses = logits.argsort(dim=1, descending=True)
    assert parts.tolist()[0] == sum(int(guesses[i, 0] == labels[i]) for i in range(20) if known[i])
    assert parts.tolist()[1] == sum(int(labels[i] in guesses[i, :5]) for i in range(20) if known[i])
    assert parts.tolist()[3] == int(known.sum())
