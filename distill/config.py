"""Settings of distillation."""

from typing import Any, Literal, Self

from distill.target import Distance, DistillMethod
from foveal.config import Config, machine, science
from foveal.models.config import DecoderConfig, Pooling, VitConfig
from foveal.rules import excludes, requires
from foveal.training.config import NO_PLATEAU_SCHEDULE, StageConfig


class StudentVitConfig(VitConfig):
    """An encoder, a ViT-S/16 by default."""

    name: str = science("vit_small_patch16_224", "timm name of a plain, rotary or relative vision transformer")


class StudentConfig(Config):
    """One of several students of one teacher."""

    name: str = science(description="Name of the student's folder in export/ and prefix of its metrics.")
    model: StudentVitConfig | None = science(None, "The student encoder.")
    backbone: str | None = science(None, "timm name of any model, instead of model.")


class TeacherCacheConfig(Config):
    """Teacher outputs on disk, reused by runs on the same views: other students, or images without augmentation."""

    dir: str | None = machine(
        None, "Folder of the cache, shared or local to each node; null: the teacher runs at every step."
    )
    max_gigabytes: float = machine(50.0, "Maximum size of one run's cache, in GB.", gt=0)


class DistillConfig(StageConfig):
    """Students that learn from a teacher, on the same view of the same image."""

    teacher: str = machine(description="The teacher's export folder. Its content is science, its path is not.")
    teacher_name: str | None = science(
        None, "timm name of a teacher without a card; teacher is then weights of others (safetensors or of torch.save)."
    )
    model: StudentVitConfig | None = science(None, "The student encoder; null: vit_small_patch16_224.")
    backbone: str | None = science(None, "timm name of any model, instead of model.")
    students: tuple[StudentConfig, ...] = science((), "Several students in one run, instead of model and backbone.")
    method: DistillMethod = science(
        "features",
        "Method: features (final features), layers (block tokens of visible patches, DMAE), relations (query-key and "
        "value-value relations, TinyMIM), logits (soft labels), token (hard labels for a distillation token, DeiT).",
    )
    distance: Distance = science(
        "cosine",
        "Distance between student and teacher tokens, for features and layers; unit_l1: L1 of unit vectors (DMAE).",
    )
    cls_weight: float = science(1.0, "Weight of the class token's distance, for features.", ge=0)
    patch_weight: float = science(1.0, "Weight of the patches' mean distance, for features.", ge=0)
    layers: tuple[tuple[int, int], ...] = science(
        (),
        "Pairs [teacher block, student block], counted from 1, for layers and relations; empty: at 3/4 of both depths; "
        "for relations with the student's last block, and of a teacher as deep as the student the last block too.",
    )
    layers_version: Literal[1, 2] = science(
        2,
        "Version of the pair of empty layers; 1: that of runs before 0.2, in which relations of a teacher as deep as "
        "the student were those of its block at 3/4 of the depth.",
        since="0.2",
        neutral=1,
    )
    layer_loss: Literal["mean", "dmae"] = science(
        "mean",
        "Loss of layers: mean of the pairs' distances; or as DMAE published it, their sum, with distance=unit_l1 and "
        "norm_pix=false as defaults.",
        since="0.2",
        neutral="mean",
    )
    mask_ratio: float = science(0.75, "Fraction of patches masked for teacher and student, for layers.", gt=0, lt=1)
    pixel_weight: float = science(1.0, "Weight of the student's pixel reconstruction, for layers; 0: no decoder.", ge=0)
    norm_pix: bool = science(True, "Normalise the reconstructed pixels per patch, for layers.")
    decoder: DecoderConfig = DecoderConfig()
    temperature: float = science(3.0, "Softmax temperature, for logits.", gt=0)
    label_weight: float = science(
        0.5, "Weight of the label loss, for logits and token; the teacher loss has the rest.", ge=0, le=1
    )
    pooling: Pooling = science("avg", "Input of the encoder's head, for logits: mean of the patches, or class token.")
    teacher_cache: TeacherCacheConfig = TeacherCacheConfig()

    alternatives = ("model", "backbone", "students")
    main_settings = ("teacher", "method", "model", "backbone", "students", *StageConfig.main_settings)
    rules = (
        *StageConfig.rules,
        NO_PLATEAU_SCHEDULE,
        excludes(
            "model",
            "students",
            because="model is a single student",
            remedy="list the model among the students",
        ),
        excludes(
            "backbone",
            "students",
            because="backbone is a single student",
            remedy="list the backbone among the students",
        ),
        excludes(
            "students>1",
            "optim.max_grad_norm",
            because="the clipped norm is of all gradients and would make the students depend on each other",
            remedy="set optim.max_grad_norm=null, or train the students one by one",
        ),
        requires(
            "layer_loss=dmae",
            "method=layers",
            because="it is the published loss of this method",
            remedy="set layer_loss=mean, or method=layers",
        ),
        requires(
            "layer_loss=dmae",
            "distance=unit_l1",
            because="DMAE compares unit vectors by L1",
            remedy="remove distance, or set layer_loss=mean",
        ),
        excludes(
            "layer_loss=dmae",
            "norm_pix=true",
            because="DMAE reconstructs pixels that are not normalised",
            remedy="remove norm_pix, or set layer_loss=mean",
        ),
        requires(
            "layers",
            "method=layers|relations",
            because="layers are pairs of blocks, and no other method compares blocks",
            remedy="remove layers, or use one of these methods",
        ),
        excludes(
            "method=features",
            "cls_weight=0",
            "patch_weight=0",
            because="they leave no loss",
            remedy="set one of the weights above 0",
        ),
        excludes(
            "method=token",
            "label_weight=0|1",
            because="the method trains two heads, and such a weight leaves one without a loss",
            remedy="set label_weight between 0 and 1, exclusive, or use method=logits",
        ),
    )

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """Validate nested plain data; layer_loss=dmae has other defaults. Raises: ConfigError that names ``source``."""
        defaults = {"distance": "unit_l1", "norm_pix": False} if values.get("layer_loss") == "dmae" else {}
        return super().from_dict(defaults | values, source)

    @property
    def export_subfolders(self) -> tuple[str, ...]:
        return tuple(student.name for student in self.students) or ("",)

    @property
    def has_epoch_invariant_targets(self) -> bool:
        """Whether the teacher's output for an image is the same in every epoch."""
        return self.data.augment.is_deterministic and self.method != "layers"
