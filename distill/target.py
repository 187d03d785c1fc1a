"""Distillation methods, and the target that teacher, students and loss share."""

from dataclasses import dataclass
from typing import Literal

DistillMethod = Literal["features", "layers", "relations", "logits", "token"]
Distance = Literal["cosine", "smooth_l1", "l1"]
BLOCK_METHODS: tuple[DistillMethod, ...] = ("layers", "relations")  # compare blocks of two encoders
CLASS_METHODS: tuple[DistillMethod, ...] = ("logits", "token")  # need a teacher with a classification head


@dataclass(frozen=True)
class TeacherTarget:
    """What the teacher computes, the same for all students.

    ``blocks`` are the teacher's blocks, counted from 1, one per pair of layers. ``heads`` and ``patch`` are the
    teacher's number of attention heads and patch size, for methods in blocks. ``patches``: features include patches.
    """

    kind: DistillMethod = "features"
    blocks: tuple[int, ...] = ()
    heads: int = 0
    patch: int = 0
    patches: bool = True
