"""The settings of distillation, and the plan they come to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from foveal.checkpoint.export import read_card
from foveal.config import machine, science
from foveal.errors import ExportError
from foveal.models.vit import EncoderCard, VitConfig
from foveal.stage import Plan, StageConfig, planned


class DistillConfig(StageConfig):
    """A student that imitates the final features of a teacher, on the same view of the same image."""

    teacher: str = machine(about="The teacher's export folder; what is in it is science, where it lies is not.")
    model: VitConfig = VitConfig(name="vit_small_patch16_224")
    distance: Literal["cosine", "smooth_l1"] = science("cosine", "How far a student's token is from the teacher's.")
    cls_weight: float = science(1.0, "Weight of the class token's distance.", ge=0)
    patch_weight: float = science(1.0, "Weight of the patches' mean distance.", ge=0)


@dataclass(frozen=True)
class DistillPlan(Plan):
    """A plan that knows how wide the teacher's tokens are; 0 only as the place of a field that is always given."""

    cfg: DistillConfig
    teacher_width: int = 0


def plan(cfg: DistillConfig, ranks: int) -> DistillPlan:
    """Everything that can be refused before a run begins. Errors: ConfigError, DataError, ExportError."""
    card = read_card(Path(cfg.teacher))
    teacher = EncoderCard.checked(card.encoder, f"{cfg.teacher}/card.json")
    if teacher.pooling == "avg":
        raise ExportError(
            f"the teacher {cfg.teacher} was fine-tuned with pooling=avg and has no norm behind its tokens; "
            f"give a pretrained encoder, or one fine-tuned with pooling=token"
        )
    student = cfg.model.fitted(cfg.data.image_size)
    for name, hers, his in (
        ("data.channels", teacher.channels, cfg.data.channels),
        ("model.patch", teacher.patch, student.patch),
    ):
        if hers != his:
            raise ExportError(
                f"the teacher {cfg.teacher} has {name.split('.')[1]} {hers}, the student's {name} is {his}; they must be equal"
            )
    return planned(
        DistillPlan,
        cfg,
        ranks,
        card=card,
        origin={"teacher": card.sha256},
        teacher_width=teacher.width,
        resized_from=teacher.resized_from(cfg.data.image_size),
    )
