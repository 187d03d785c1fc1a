"""What is taught, in words that the teacher, its students and the loss share."""

from dataclasses import dataclass
from typing import Literal

DistillMethod = Literal["features", "layers", "relations", "logits", "token"]
BLOCK_METHODS: tuple[DistillMethod, ...] = ("layers", "relations")  # of a plain transformer, block by block
CLASS_METHODS: tuple[DistillMethod, ...] = ("logits", "token")  # by a teacher with a head


@dataclass(frozen=True)
class TeacherTarget:
    """What a teacher is asked, the same for all of its students.

    ``blocks`` are the teacher's, counted from 1, one for each pair of layers; ``heads`` are those of its attention and
    ``patch`` is its patches' side, where the lesson is in blocks; ``patches``: whether features have those of patches.
    """

    kind: DistillMethod = "features"
    blocks: tuple[int, ...] = ()
    heads: int = 0
    patch: int = 0
    patches: bool = True
