"""What each kind of lesson costs, and its slope in the student's answers, against formulas written out in NumPy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from teachers import config
from torch import Tensor, nn
from torch.nn import functional as F

from distill.objective import DistillationLoss
from distill.target import TeacherTarget
from foveal.data.batch import Batch
from foveal.seeding import derive_key, draw_uniform_numpy

B, SIZE, PATCH, HEADS, CLASSES = 3, 8, 2, 2, 5
L, P, WIDTH = (SIZE // PATCH) ** 2, PATCH * PATCH, 6
MEAN, STD = (0.4,), (0.2,)
LABELS = (2, -1, 0)
DRAWS = (4011, 4003, 4500)
Vector = np.ndarray


class Answers(nn.Module):
    """A teacher or a model that says what it was told to, and remembers what it was asked."""

    def __init__(self, lesson: TeacherTarget, *said: Tensor) -> None:
        super().__init__()
        self.target, self.said = lesson, said
        self.asked: tuple[Any, ...] = ()

    def forward(self, *asked: Any) -> Any:
        self.asked = asked
        return self.said


class Model(nn.Module):
    """Students around answers."""

    def __init__(self, *students: Answers) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(self, *asked: Any) -> Any:
        return tuple(student(*asked) for student in self.students)


def batch() -> Batch:
    images = torch.randint(0, 256, (B, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    draws = torch.tensor(DRAWS)
    return Batch(images, torch.tensor(LABELS), draws, draws, torch.ones(B, dtype=torch.bool), 7, 4, 0)


def drawn(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1.5 * torch.randn(shape, generator=generator) for shape in shapes]


def learned(
    lesson: list[Tensor], answer: list[Tensor], asked: TeacherTarget, **settings: Any
) -> tuple[float, list[Vector], dict[str, float], Answers]:
    """The loss over the weight, its slope in each answer, the numbers over the weight, and the student."""
    for each in answer:
        each.requires_grad_()
    student = Answers(asked, *answer)
    cfg = config(Path("x"), Path("x"), method=asked.kind, seed=9, **settings)
    objective = DistillationLoss(Answers(asked, *lesson), cfg, [""], MEAN, STD)  # pyright: ignore[reportArgumentType]
    total, numbers = objective(Model(student), batch())
    (total / objective.batch_weight(batch())).backward()
    slopes = [np.zeros(each.shape) if each.grad is None else each.grad.double().numpy() for each in answer]
    return total.item() / B, slopes, {name: value.item() / B for name, value in numbers.items()}, student


def softmax(row: Vector) -> Vector:
    powers = np.exp(row - row.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def distance(name: str, a: Vector, b: Vector) -> tuple[float, Vector]:
    """Of two vectors, and its slope in the first."""
    if name == "cosine":
        dot, of_a, of_b = a @ b, math.sqrt(a @ a), math.sqrt(b @ b)
        return float(1 - dot / (of_a * of_b)), dot * a / (of_a**3 * of_b) - b / (of_a * of_b)
    if name == "unit_l1":
        of_a = math.sqrt(a @ a)
        sign = np.sign(a / of_a - b / math.sqrt(b @ b)) / len(a)
        return float(abs(a / of_a - b / math.sqrt(b @ b)).mean()), sign / of_a - (sign @ a) * a / of_a**3
    apart = a - b
    if name == "l1":
        return float(abs(apart).mean()), np.sign(apart) / len(a)
    small = abs(apart) < 1
    value = np.where(small, apart**2 / 2, abs(apart) - 0.5).mean()
    return float(value), np.where(small, apart, np.sign(apart)) / len(a)


def tokens_apart(name: str, answer: Tensor, lesson: Tensor) -> tuple[float, Vector]:
    """The mean over images and tokens [B, N, T], and its slope."""
    a, b = answer.detach().double().numpy(), lesson.double().numpy()
    slope, total = np.zeros_like(a), 0.0
    for image, token in np.ndindex(a.shape[:2]):
        one, slope[image, token] = distance(name, a[image, token], b[image, token])
        total += one
    return total / (a.shape[0] * a.shape[1]), slope / (a.shape[0] * a.shape[1])


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", ["cosine", "smooth_l1", "l1", "unit_l1"])
def test_features(name: str) -> None:
    shapes = (B, WIDTH), (B, L, WIDTH)
    lesson, answer = drawn(*shapes, seed=1), drawn(*shapes, seed=2)
    loss, slopes, numbers, _ = learned(
        lesson, answer, TeacherTarget("features"), distance=name, cls_weight=0.5, patch_weight=2.0
    )
    cls, of_cls = tokens_apart(name, answer[0][:, None], lesson[0][:, None])
    patches, of_patches = tokens_apart(name, answer[1], lesson[1])
    close(loss, 0.5 * cls + 2 * patches)
    close(slopes[0], 0.5 * of_cls[:, 0])
    close(slopes[1], 2 * of_patches)
    close([numbers["cls_distance"], numbers["patch_distance"]], [cls, patches])


def test_features_without_patches() -> None:
    (lesson,), (answer,) = drawn((B, WIDTH), seed=1), drawn((B, WIDTH), seed=2)
    loss, (slope,), numbers, _ = learned([lesson], [answer], TeacherTarget("features", patches=False), patch_weight=0.0)
    cls, of_cls = tokens_apart("cosine", answer[:, None], lesson[:, None])
    close(loss, cls)
    close(slope, of_cls[:, 0])
    assert set(numbers) == {"cls_distance"}


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("name", ["cosine", "smooth_l1", "l1"])
def test_layers_and_pixels(name: str, norm_pix: bool) -> None:
    """Two pairs of layers weigh one; the masked patches are those with the highest numbers, for teacher and student."""
    kept, shape = 4, (B, 5, WIDTH)
    lesson, answer = drawn(shape, shape, seed=1), drawn(shape, shape, (B, L - kept, P), seed=2)
    loss, slopes, numbers, student = learned(
        lesson, answer, TeacherTarget("layers", (1, 2), 2, PATCH), distance=name, pixel_weight=0.7, norm_pix=norm_pix
    )
    noise = draw_uniform_numpy(derive_key(9, "mask"), np.array(DRAWS), L)
    order = noise.argsort(axis=1, kind="stable")
    _, shown, masked = student.asked
    assert np.array_equal(shown.numpy(), order[:, :kept])
    assert np.array_equal(masked.numpy(), order[:, kept:])

    pairs = [tokens_apart(name, answer[pair], lesson[pair]) for pair in range(2)]
    images, pred = (batch().images.numpy()[:, 0] / 255 - MEAN[0]) / STD[0], answer[2].detach().double().numpy()
    pixel, of_pixel = 0.0, np.zeros_like(pred)
    for image, slot in np.ndindex(pred.shape[:2]):
        row, column = (PATCH * each for each in divmod(order[image, kept + slot], SIZE // PATCH))
        wanted = images[image, row : row + PATCH, column : column + PATCH].flatten()
        if norm_pix:
            wanted = (wanted - wanted.mean()) / math.sqrt(wanted.var(ddof=1) + 1e-6)
        apart = pred[image, slot] - wanted
        pixel += (apart**2).mean() / pred[..., 0].size
        of_pixel[image, slot] = 2 * apart / pred.size
    token = (pairs[0][0] + pairs[1][0]) / 2
    close(loss, token + 0.7 * pixel)
    close(slopes[0], pairs[0][1] / 2)
    close(slopes[1], pairs[1][1] / 2)
    close(slopes[2], 0.7 * of_pixel)
    close([numbers["token_distance"], numbers["pixel_loss"]], [token, pixel])


def test_dmae() -> None:
    """As DMAE's code: the L1 loss of normalised tokens, summed over pairs, and the error of pixels as they are."""
    shape = (B, 5, WIDTH)
    lesson, answer = drawn(shape, shape, seed=1), drawn(shape, shape, (B, L - 4, P), seed=2)
    loss, slopes, numbers, _ = learned(lesson, answer, TeacherTarget("layers", (1, 2), 2, PATCH), layer_loss="dmae")
    pairs = [tokens_apart("unit_l1", answer[pair], lesson[pair]) for pair in range(2)]
    close(numbers["token_distance"], pairs[0][0] + pairs[1][0])
    close(slopes[0], pairs[0][1])
    close(slopes[1], pairs[1][1])
    close(loss, numbers["token_distance"] + numbers["pixel_loss"])
    units = [(F.normalize(a.detach(), dim=-1), F.normalize(b, dim=-1)) for a, b in zip(answer, lesson, strict=False)]
    close(numbers["token_distance"], sum(F.l1_loss(*unit).item() for unit in units))
    raw = learned(lesson, answer, TeacherTarget("layers", (1, 2), 2, PATCH), norm_pix=False)[2]
    assert numbers["pixel_loss"] == raw["pixel_loss"]


def relation(a: Vector, b: Vector, other_a: Vector, other_b: Vector) -> tuple[float, Vector, Vector]:
    """The divergence of softmax(a b^T / sqrt(d)) from the others', mean over tokens, and its slopes in a and b."""
    root = math.sqrt(a.shape[1])
    ours, theirs = softmax(a @ b.T / root), softmax(other_a @ other_b.T / math.sqrt(other_a.shape[1]))
    value = (theirs * np.log(theirs / ours)).sum() / len(a)
    slope = (ours - theirs) / len(a) / root
    return value, slope @ b, slope.T @ a


def test_relations() -> None:
    """The student has 8 numbers a token, the teacher 12; both are split into the teacher's two heads."""
    tokens, mine, hers = 5, 8, 12
    lesson = drawn((B, tokens, 3 * hers), (B, tokens, 3 * hers), seed=1)
    answer = drawn((B, tokens, 3 * mine), (B, tokens, 3 * mine), seed=2)
    loss, slopes, numbers, _ = learned(lesson, answer, TeacherTarget("relations", (1, 2), HEADS, PATCH))
    qk = vv = 0.0
    wanted = [np.zeros((B, tokens, 3 * mine)) for _ in range(2)]
    for pair, image, head in np.ndindex(2, B, HEADS):
        parts, others = (
            [
                said[pair]
                .detach()
                .double()
                .numpy()[image][:, part * width :][:, head * width // HEADS :][:, : width // HEADS]
                for part in range(3)
            ]
            for said, width in ((answer, mine), (lesson, hers))
        )
        one, of_q, of_k = relation(parts[0], parts[1], others[0], others[1])
        other, of_v, of_v_again = relation(parts[2], parts[2], others[2], others[2])
        share = 1 / (2 * B * HEADS)
        qk, vv = qk + one * share, vv + other * share
        for part, slope in enumerate((of_q, of_k, of_v + of_v_again)):
            start = part * mine + head * mine // HEADS
            wanted[pair][image, :, start : start + mine // HEADS] = slope * share
    close(loss, qk + vv)
    for found, slope in zip(slopes, wanted, strict=True):
        close(found, slope)
    close([numbers["qk_divergence"], numbers["vv_divergence"]], [qk, vv])


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels(temperature: float, weight: float) -> None:
    """The slope is T (softmax(s / T) - softmax(t / T)) / B; an image without a label has that part alone."""
    (lesson,), (answer,) = drawn((B, CLASSES), seed=1), drawn((B, CLASSES), seed=2)
    loss, (slope,), numbers, _ = learned(
        [lesson], [answer], TeacherTarget("logits"), temperature=temperature, label_weight=weight
    )
    s, t = answer.detach().double().numpy(), lesson.double().numpy()
    ours, theirs = softmax(s / temperature), softmax(t / temperature)
    soft = temperature**2 * (theirs * np.log(theirs / ours)).sum() / B
    known = [image for image in range(B) if LABELS[image] >= 0]
    label = -sum(math.log(softmax(s)[image, LABELS[image]]) for image in known) / B
    of_label = np.zeros((B, CLASSES))
    for image in known:
        of_label[image] = softmax(s)[image] - np.eye(CLASSES)[LABELS[image]]
    close(loss, (1 - weight) * soft + weight * label)
    close(slope, (1 - weight) * temperature * (ours - theirs) / B + weight * of_label / B)
    close(numbers["soft_loss"], soft)
    deit = torch.nn.functional.kl_div(
        (answer / temperature).log_softmax(1), (lesson / temperature).log_softmax(1), reduction="sum", log_target=True
    )
    close(numbers["soft_loss"], CLASSES * temperature**2 * deit.item() / answer.numel())


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_a_distillation_token(weight: float) -> None:
    """The class token's slope is softmax - label, the distillation token's softmax - the teacher's guess."""
    lesson, answer = torch.tensor([1, 4, 0]), drawn((B, CLASSES), (B, CLASSES), seed=2)
    loss, slopes, numbers, _ = learned([lesson], answer, TeacherTarget("token"), label_weight=weight)
    first, second = (softmax(each.detach().double().numpy()) for each in answer)
    label = -sum(math.log(first[image, wanted]) for image, wanted in enumerate(LABELS) if wanted >= 0) / B
    guess = -sum(math.log(second[image, wanted]) for image, wanted in enumerate(lesson.tolist())) / B
    close(loss, weight * label + (1 - weight) * guess)
    known = np.array(LABELS)[:, None] >= 0
    close(slopes[0], weight * known * (first - np.eye(CLASSES)[list(LABELS)]) / B)
    close(slopes[1], (1 - weight) * (second - np.eye(CLASSES)[lesson.numpy()]) / B)
    close(numbers["teacher_agreement"], (second.argmax(1) == lesson.numpy()).mean())


def test_several_students_are_summed_and_told_apart() -> None:
    (lesson,), (one, other) = drawn((B, WIDTH), seed=1), drawn((B, WIDTH), (B, WIDTH), seed=2)
    asked = TeacherTarget("features", patches=False)
    cfg = config(Path("x"), Path("x"), patch_weight=0.0)
    teacher = Answers(asked, lesson)
    model = Model(Answers(asked, one), Answers(asked, other))
    total, numbers = DistillationLoss(teacher, cfg, ["a", "b"], MEAN, STD)(model, batch())  # pyright: ignore[reportArgumentType]
    assert set(numbers) == {"a/loss", "a/cls_distance", "b/loss", "b/cls_distance"}
    close(total.item(), numbers["a/loss"].item() + numbers["b/loss"].item())
    close(numbers["b/cls_distance"].item() / B, tokens_apart("cosine", other[:, None], lesson[:, None])[0])
