"""Per-image losses between student and teacher outputs, without parameters and without randomness.

B images, N tokens, D student width, T teacher width, K classes.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from distill.target import Distance

_IGNORE_INDEX = -1


def cosine_distance(pred: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity of two [..., T], as [...]."""
    return 1.0 - F.cosine_similarity(pred, target, dim=-1)


def smooth_l1_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Huber loss with threshold 1 of two [..., T], mean over T, as [...]."""
    return F.smooth_l1_loss(pred, target, reduction="none").mean(dim=-1)


def l1_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of two [..., T], mean over T, as [...]."""
    return (pred - target).abs().mean(dim=-1)


def unit_l1_distance(pred: Tensor, target: Tensor) -> Tensor:
    """Absolute difference of two [..., T] divided by their norms, mean over T, as [...] (DMAE: Bai et al., 2023)."""
    return l1_distance(F.normalize(pred, dim=-1), F.normalize(target, dim=-1))


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "smooth_l1": smooth_l1_distance,
    "l1": l1_distance,
    "unit_l1": unit_l1_distance,
}


def relation_losses_per_image(
    student_qkv: Tensor, teacher_qkv: Tensor, teacher_num_heads: int
) -> tuple[Tensor, Tensor]:
    """TinyMIM's divergences [B] of the Q-K and V-V relations, mean over heads and tokens (Ren et al., 2023).

    ``student_qkv`` [B, N, 3 D] and ``teacher_qkv`` [B, N, 3 T] are concatenated queries, keys and values. Both are
    split into the teacher's ``num_heads``, whatever the student's own number, as in MiniLMv2 (Wang et al., 2021):
    relations [B, heads, N, N] do not depend on the width. TinyMIM gives the student's last block itself that many heads.
    """
    teacher, student = _split_qkv(teacher_qkv, teacher_num_heads), _split_qkv(student_qkv, teacher_num_heads)
    return (
        _relation_divergence(student[0], student[1], teacher[0], teacher[1]),
        _relation_divergence(student[2], student[2], teacher[2], teacher[2]),
    )


def label_loss_per_image(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy [B] of logits [B, K]; 0 for an image without a label."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=_IGNORE_INDEX)


def _split_qkv(qkv: Tensor, num_heads: int) -> Tensor:
    """Return queries, keys and values [B, N, 3 W] as [3, B, heads, N, W / heads]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def _relation_divergence(
    student_rows: Tensor, student_columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor
) -> Tensor:
    """KL divergence [B] of the student's relation softmax(rows columns^T / sqrt(d)) from the teacher's.

    Rows and columns are [B, heads, N, d].
    """
    student, teacher = (
        (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).log_softmax(dim=-1)
        for a, b in ((student_rows, student_columns), (teacher_rows, teacher_columns))
    )
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean(dim=(1, 2))
