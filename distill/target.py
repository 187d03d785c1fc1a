"""Distillation methods, and the target that teacher, students and loss share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveal.errors import ConfigError

DistillMethod = Literal["features", "layers", "relations", "logits", "token"]
Distance = Literal["cosine", "smooth_l1", "l1", "unit_l1"]
BLOCK_METHODS: tuple[DistillMethod, ...] = ("layers", "relations")  # compare blocks of two encoders
CLASS_METHODS: tuple[DistillMethod, ...] = ("logits", "token")  # need a teacher with a classification head
_DEFAULT_DEPTH_FRACTION = 0.75  # of the depth: DMAE's pair of a ViT-L and a ViT-B is [18, 9], TinyMIM's is [18, 12]


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


def default_teacher_block(
    method: DistillMethod, teacher_depth: int, student_depths: Sequence[int], layers_version: int
) -> int:
    """Return the teacher's block of a method in blocks for which no pair is stated.

    For relations it is TinyMIM's (Ren et al., 2023): the last block if teacher and student are equally deep, else the
    one three quarters deep. For layers it is three quarters deep, as in DMAE (Bai et al., 2023).
    Raises: ConfigError if students need different blocks.
    """
    block = _block_at_default_depth(teacher_depth)
    if method != "relations" or layers_version == 1 or teacher_depth not in student_depths:
        return block
    if set(student_depths) != {teacher_depth}:
        raise ConfigError(
            f"layers is empty, and students of depths {', '.join(map(str, student_depths))} would need two blocks of "
            f"the teacher: its last, {teacher_depth}, for those that are as deep, and {block} for the others; state "
            f"layers"
        )
    return teacher_depth


def default_student_block(method: DistillMethod, student_depth: int) -> int:
    """Return the student's block of a method in blocks for which no pair is stated."""
    return student_depth if method == "relations" else _block_at_default_depth(student_depth)


def _block_at_default_depth(depth: int) -> int:
    """Return the block three quarters deep, counted from 1."""
    return max(1, round(_DEFAULT_DEPTH_FRACTION * depth))
