"""The pair of blocks that is compared where none is stated: the published pairs of DMAE and TinyMIM."""

import pytest

from distill.target import DistillMethod, default_student_block, default_teacher_block
from foveal.errors import ConfigError


@pytest.mark.parametrize(
    ("method", "teacher_depth", "student_depths", "blocks"),
    [
        ("layers", 24, [12], (18, [9])),  # DMAE's ViT-L and ViT-B
        ("layers", 12, [12], (9, [9])),
        ("relations", 24, [12], (18, [12])),  # TinyMIM's ViT-L and ViT-B
        ("relations", 12, [12], (12, [12])),  # TinyMIM's ViT-B and ViT-S, ViT-S and ViT-Ti
        ("relations", 12, [12, 12], (12, [12, 12])),
        ("relations", 12, [6], (9, [6])),
        ("relations", 12, [24], (9, [24])),
        ("relations", 32, [12, 24], (24, [12, 24])),
        ("relations", 1, [2], (1, [2])),
    ],
)
def test_the_published_pairs(
    method: DistillMethod, teacher_depth: int, student_depths: list[int], blocks: tuple[int, list[int]]
) -> None:
    teacher_block = default_teacher_block(method, teacher_depth, student_depths, layers_version=2)
    assert (teacher_block, [default_student_block(method, depth) for depth in student_depths]) == blocks


@pytest.mark.parametrize(("depth", "block"), [(4, 3), (12, 9), (24, 18)])
def test_runs_before_0_2_keep_their_block(depth: int, block: int) -> None:
    assert default_teacher_block("relations", depth, [depth, 2], layers_version=1) == block


def test_students_that_need_two_blocks_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"students of depths 12, 6 would need two blocks of the teacher: its last, 12"
    ):
        default_teacher_block("relations", 12, [12, 6], layers_version=2)
