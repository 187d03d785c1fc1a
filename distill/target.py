"""What is taught, in words that the teacher, its students and the loss share."""

from dataclasses import dataclass
from typing import Literal

LessonKind = Literal["features", "layers", "relations", "logits", "token"]
IN_BLOCKS: tuple[LessonKind, ...] = ("layers", "relations")  # of a plain transformer, block by block
IN_CLASSES: tuple[LessonKind, ...] = ("logits", "token")  # by a teacher with a head


@dataclass(frozen=True)
class Lesson:
    """What a teacher is asked, the same for all of its students.

    ``blocks`` are the teacher's, counted from 1, one for each pair of layers; ``heads`` are those of its attention and
    ``patch`` is its patches' side, where the lesson is in blocks; ``patches``: whether features have those of patches.
    """

    kind: LessonKind = "features"
    blocks: tuple[int, ...] = ()
    heads: int = 0
    patch: int = 0
    patches: bool = True
