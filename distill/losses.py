"""How far an answer is from a lesson, image by image: arithmetic on tensors, without parameters and without randomness.

B images, N tokens, D student width, T teacher width, K classes.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Distance = Literal["cosine", "smooth_l1", "l1"]
_UNLABELLED = -1


def cosine(answer: Tensor, lesson: Tensor) -> Tensor:
    """1 - cosine similarity of two [..., T], as [...]."""
    return 1.0 - F.cosine_similarity(answer, lesson, dim=-1)


def smooth_l1(answer: Tensor, lesson: Tensor) -> Tensor:
    """The Huber loss with threshold 1 of two [..., T], mean over T, as [...]."""
    return F.smooth_l1_loss(answer, lesson, reduction="none").mean(dim=-1)


def l1(answer: Tensor, lesson: Tensor) -> Tensor:
    """The absolute difference of two [..., T], mean over T, as [...]."""
    return (answer - lesson).abs().mean(dim=-1)


DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine, "smooth_l1": smooth_l1, "l1": l1}


def relation_losses(answer: Tensor, lesson: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """TinyMIM's relations (Ren et al., 2023): divergences [B] of the Q-K and of the V-V relation, mean over heads and tokens.

    ``answer`` [B, N, 3 D] and ``lesson`` [B, N, 3 T] are queries, keys and values side by side. Both are split into the
    teacher's ``heads``, whatever the student's own are, as in MiniLMv2 (Wang et al., 2021): relations [B, heads, N, N]
    have no width.
    """
    hers, his = (each.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4) for each in (lesson, answer))
    return _divergence(his[0], his[1], hers[0], hers[1]), _divergence(his[2], his[2], hers[2], hers[2])


def label_loss(answer: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy [B] of logits [B, K]; 0 for an image without a label."""
    return F.cross_entropy(answer, labels, reduction="none", ignore_index=_UNLABELLED)


def _divergence(rows: Tensor, columns: Tensor, rows_lesson: Tensor, columns_lesson: Tensor) -> Tensor:
    """The divergence [B] of two relations softmax(rows columns^T / sqrt(d)) of tokens [B, heads, N, d], the lesson's first."""
    his, hers = (
        (a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5).log_softmax(dim=-1)
        for a, b in ((rows, columns), (rows_lesson, columns_lesson))
    )
    return F.kl_div(his, hers, reduction="none", log_target=True).sum(dim=-1).mean(dim=(1, 2))
