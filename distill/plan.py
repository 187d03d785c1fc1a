"""The plan of a distillation run: teacher, students, and every check possible before the run begins."""

from dataclasses import dataclass, replace
from pathlib import Path

from distill.compatibility import StudentSpec, TeacherSpec, build_student_spec, build_teacher_spec, resolve_class_names
from distill.config import DistillConfig, StudentConfig, StudentVitConfig
from distill.target import CLASS_METHODS, TeacherTarget
from foveal.config import check_folder_name
from foveal.errors import ConfigError
from foveal.models.backbone import format_image_size
from foveal.training.plan import Plan, build_stage_plan
from foveal.weights.pretrained import PretrainedSource, SourceModel, inspect_pretrained

_EXPORT_FILES = {"card.json", "config.json", "model.safetensors", "README.md"}


@dataclass(frozen=True)
class DistillPlan(Plan):
    """A plan with the teacher and the students; ``classes`` are the learned class names, empty for methods without."""

    cfg: DistillConfig
    teacher_source: PretrainedSource = None  # type: ignore[assignment]
    teacher_spec: TeacherSpec = None  # type: ignore[assignment]
    student_specs: tuple[StudentSpec, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def target(self) -> TeacherTarget:
        return self.teacher_spec.target

    @property
    def source_models(self) -> dict[str, SourceModel]:
        source = self.teacher_source
        return {"teacher": SourceModel(source.path, source.card.sha256, source.card)}

    def summary_lines(self) -> list[str]:
        """Return the plan as text, with a warning for students whose results depend on the cluster."""
        blocks = f", blocks {', '.join(map(str, self.target.blocks))}" if self.target.blocks else ""
        lines = [*super().summary_lines(), f"method    {self.target.kind} of {self.cfg.teacher}{blocks}"]
        if self.teacher_spec.resized_from is not None:
            trained_size = format_image_size(self.teacher_spec.resized_from)
            size = format_image_size(self.cfg.data.image_size)
            lines.append(f"teacher   trained on images of {trained_size} pixels, used at {size}")
        if self.cfg.teacher_cache.dir is not None:
            lines.append(f"cache     {self.cfg.teacher_cache.dir}; a forecast counts the teacher in every step")
        for student in self.student_specs:
            lines.append(f"student   {student.display_name}{student.description_suffix}")
            if student.has_batch_norm:
                lines.append(
                    f"beware    {student.display_name} has BatchNorm, which normalises each microbatch on its rank: "
                    f"results depend on world size and microbatch size ({self.world_size} and {self.microbatch_size})"
                )
        return lines


def plan_distillation(cfg: DistillConfig, world_size: int) -> DistillPlan:
    """Return the checked plan of these settings. Raises: ConfigError, DataError, ExportError."""
    students = resolve_students(cfg)
    _check_settings(cfg)
    source = inspect_pretrained(Path(cfg.teacher), cfg.teacher_name, cfg.data)
    student_models = [student.model for student in students if student.model is not None]
    teacher_spec = build_teacher_spec(cfg, source.card, student_models)
    student_specs = tuple(
        build_student_spec(cfg, teacher_spec, student.name, student.model, student.backbone) for student in students
    )
    stage_plan = build_stage_plan(
        DistillPlan,
        cfg,
        world_size,
        source_card=source.card,
        source_notes=source.notes,
        extra_science={"teacher": source.card.sha256}
        | ({"classes": ", ".join(source.card.classes)} if cfg.method in CLASS_METHODS else {}),
        teacher_spec=teacher_spec,
        student_specs=student_specs,
    )
    stage_plan = replace(stage_plan, teacher_source=source)
    batch_norm_student = next((spec for spec in student_specs if spec.has_batch_norm), None)
    if batch_norm_student is not None and stage_plan.microbatch_size == 1:
        raise ConfigError(
            f"{batch_norm_student.display_name} has BatchNorm, which cannot train on microbatches of 1 image; use a "
            f"larger batch.max_micro_size, or fewer ranks"
        )
    if cfg.method in CLASS_METHODS:
        classes = resolve_class_names(cfg, teacher_spec, stage_plan.training_set.sources)
        stage_plan = replace(stage_plan, classes=classes)
    return stage_plan


def resolve_students(cfg: DistillConfig) -> tuple[StudentConfig, ...]:
    """Return all students, each with a model or a backbone; a single student has the empty name.

    Raises: ConfigError if settings exclude each other.
    """
    has_single_student = cfg.model is not None or cfg.backbone is not None
    if not cfg.students:
        default = StudentConfig(name="", model=None if has_single_student else StudentVitConfig())
        return (_resolve_student(default, cfg, "model"),)
    for number, student in enumerate(cfg.students):
        check_folder_name(f"students.{number}.name", student.name)
    names = [student.name for student in cfg.students]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ConfigError(f"two students have the name {duplicate}: each needs its own folder in export/")
    if reserved := _EXPORT_FILES & set(names):
        raise ConfigError(f"a student cannot have the name {min(reserved)}, which is a file of an export")
    return tuple(
        _resolve_student(student, student, f"students.{number}.model") for number, student in enumerate(cfg.students)
    )


def _resolve_student(
    student: StudentConfig, settings: DistillConfig | StudentConfig, setting_name: str
) -> StudentConfig:
    """Return the student with its model or backbone. Raises: ConfigError unless exactly one is set."""
    model, backbone = settings.model or student.model, settings.backbone
    if model is not None and backbone is not None:
        raise ConfigError(
            f"{setting_name} and {setting_name.removesuffix('model')}backbone exclude each other: keep one of them"
        )
    if model is None and backbone is None:
        raise ConfigError(f"{setting_name} is missing: give it, or {setting_name.removesuffix('model')}backbone")
    return StudentConfig(name=student.name, model=model, backbone=backbone)


def _check_settings(cfg: DistillConfig) -> None:
    """Raise: ConfigError for settings that cannot be, whatever the teacher and the students."""
    duplicate = next((list(pair) for pair in cfg.layers if cfg.layers.count(pair) > 1), None)
    if duplicate is not None:
        raise ConfigError(f"layers has the pair {duplicate} twice")
    if cfg.teacher_cache.dir is not None and cfg.data.mix and not cfg.has_epoch_invariant_targets:
        raise ConfigError(
            "teacher_cache.dir needs a fixed number of views, which data.mix does not have if views differ by epoch; "
            "remove one of the two"
        )
