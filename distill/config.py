"""The settings of distillation."""

from distill.losses import Distance
from distill.target import DistillMethod
from foveal.config import Config, machine, science
from foveal.models.mae import DecoderConfig
from foveal.models.vit import Pooling, VitConfig
from foveal.training.plan import StageConfig


class StudentVitConfig(VitConfig):
    """An encoder that is small unless its name says otherwise."""

    name: str = science("vit_small_patch16_224", "timm name of a plain, rotary or relative vision transformer")


class StudentConfig(Config):
    """One of several students of one teacher."""

    name: str = science(description="Its folder in export/, and the beginning of its numbers' names.")
    model: StudentVitConfig | None = science(None, "The student.")
    backbone: str | None = science(None, "Any model of timm as it is, instead of model.")


class TeacherCacheConfig(Config):
    """The teacher's answers on disk, for who trains on the same views again: other students, or images without augmentation."""

    dir: str | None = machine(
        None, "A folder that all ranks see, or one on each node; none: the teacher is always asked."
    )
    gigabytes: float = machine(50.0, "The most that one run's answers may take.", gt=0)


class DistillConfig(StageConfig):
    """Students that learn from a teacher, on the same view of the same image."""

    teacher: str = machine(description="The teacher's export folder; what is in it is science, where it lies is not.")
    teacher_name: str | None = science(
        None, "Timm's name of a teacher that is no export: teacher is then a safetensors file, or a folder with one."
    )
    model: StudentVitConfig | None = science(None, "The student; vit_small_patch16_224, if nothing else is said.")
    backbone: str | None = science(None, "Any model of timm as it is, instead of model.")
    students: tuple[StudentConfig, ...] = science((), "Several students at once, instead of model and backbone.")
    lesson: DistillMethod = science(
        "features",
        "What is imitated: final features; tokens of layers, of visible patches alone (DMAE); relations of queries and "
        "keys and of values (TinyMIM); logits; or the teacher's guess, by a distillation token (DeiT).",
    )
    distance: Distance = science(
        "cosine", "How far a student's token is from the teacher's, for features and layers (DMAE: l1)."
    )
    cls_weight: float = science(1.0, "Weight of the class token's distance, for features.", ge=0)
    patch_weight: float = science(1.0, "Weight of the patches' mean distance, for features.", ge=0)
    layers: tuple[tuple[int, int], ...] = science(
        (),
        "Pairs [teacher's block, student's block], counted from 1, for layers and relations; none: three quarters deep in "
        "both, for relations with the student's last.",
    )
    mask_ratio: float = science(0.75, "Share of the patches that nobody sees, for layers.", gt=0, lt=1)
    pixel_weight: float = science(1.0, "Weight of the student's own reconstruction, for layers; 0: no decoder.", ge=0)
    norm_pix: bool = science(True, "Reconstruct pixels normalised patch by patch, for layers.")
    decoder: DecoderConfig = DecoderConfig()
    temperature: float = science(3.0, "What logits are divided by, for logits.", gt=0)
    label_weight: float = science(
        0.5, "Weight of the labels, for logits and token; the teacher has the rest.", ge=0, le=1
    )
    pooling: Pooling = science(
        "avg", "What the head of model reads, for logits: the patches' mean, or the class token."
    )
    lesson_cache: TeacherCacheConfig = TeacherCacheConfig()

    @property
    def export_names(self) -> tuple[str, ...]:
        return tuple(student.name for student in self.students) or ("",)

    @property
    def has_fixed_targets(self) -> bool:
        """Whether the teacher says the same of an image in every epoch."""
        return self.data.augment.is_deterministic and self.lesson != "layers"
