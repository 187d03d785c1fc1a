"""What the settings of distillation come to: teacher, students, and all that can be refused before a run begins."""

from dataclasses import dataclass, replace
from pathlib import Path

from distill.compatibility import StudentSpec, TeacherSpec, build_teacher_spec, check_compatible, resolve_class_names
from distill.config import DistillConfig, StudentConfig, StudentVitConfig
from distill.target import CLASS_METHODS, TeacherTarget
from foveal.config import check_folder_name
from foveal.errors import ConfigError
from foveal.models.backbone import format_image_size
from foveal.training.plan import Plan, build_stage_plan
from foveal.weights.pretrained import PretrainedSource, inspect_pretrained

_EXPORT_FILES = {"card.json", "model.safetensors"}


@dataclass(frozen=True)
class DistillPlan(Plan):
    """A plan that knows the teacher, what it is asked, and who listens; ``classes`` are those that are learned, if any."""

    cfg: DistillConfig
    teacher_source: PretrainedSource = None  # type: ignore[assignment]
    teacher_spec: TeacherSpec = None  # type: ignore[assignment]
    student_specs: tuple[StudentSpec, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def target(self) -> TeacherTarget:
        return self.teacher_spec.target

    def summary_lines(self) -> list[str]:
        """The plan in words: what is taught to whom, and whose curve is its own on every cluster."""
        blocks = f", blocks {', '.join(map(str, self.target.blocks))}" if self.target.blocks else ""
        lines = [*super().summary_lines(), f"lesson    {self.target.kind} of {self.cfg.teacher}{blocks}"]
        if self.teacher_spec.resized_from is not None:
            was, now = (format_image_size(size) for size in (self.teacher_spec.resized_from, self.cfg.data.image_size))
            lines.append(f"teacher   trained on images of {was}, sees {now} pixels")
        if self.cfg.lesson_cache.dir is not None:
            lines.append(f"answers   kept in {self.cfg.lesson_cache.dir}; a forecast counts the teacher in every step")
        for pupil in self.student_specs:
            lines.append(f"student   {pupil.display_name}{pupil.description}")
            if pupil.has_batch_norm:
                lines.append(
                    f"beware    {pupil.display_name} has BatchNorm, which sees the images of a micro on its rank: its curve depends "
                    f"on ranks and images at once ({self.world_size} and {self.microbatch_size} here)"
                )
        return lines


def plan(cfg: DistillConfig, ranks: int) -> DistillPlan:
    """Everything that can be refused before a run begins. Raises: ConfigError, DataError, ExportError."""
    students = resolve_students(cfg)
    _check_settings(cfg)
    source = inspect_pretrained(Path(cfg.teacher), cfg.teacher_name, cfg.data)
    teacher_spec = build_teacher_spec(cfg, source.card)
    student_specs = tuple(
        check_compatible(cfg, teacher_spec, each.name, each.model, each.backbone) for each in students
    )
    found = build_stage_plan(
        DistillPlan,
        cfg,
        ranks,
        source_card=source.card,
        extra_science={"teacher": source.card.sha256}
        | ({"classes": ", ".join(source.card.classes)} if cfg.lesson in CLASS_METHODS else {}),
        teacher_spec=teacher_spec,
        student_specs=student_specs,
    )
    found = replace(found, teacher_source=source)
    mixing = next((spec for spec in student_specs if spec.has_batch_norm), None)
    if mixing is not None and found.microbatch_size == 1:
        raise ConfigError(
            f"{mixing.display_name} has BatchNorm, and a rank would hold one image at once: nothing to normalise it by; a larger "
            f"batch.at_once, or fewer ranks"
        )
    if cfg.lesson in CLASS_METHODS:
        found = replace(found, classes=resolve_class_names(cfg, teacher_spec, found.training_set.sources))
    return found


def resolve_students(cfg: DistillConfig) -> tuple[StudentConfig, ...]:
    """Every student, each with a model or a backbone; a student without a name is the only one. Raises: ConfigError."""
    alone = cfg.model is not None or cfg.backbone is not None
    if alone and cfg.students:
        raise ConfigError(
            f"{'model' if cfg.model else 'backbone'} and students exclude each other: put it among the students"
        )
    if not cfg.students:
        return (_resolve_student(StudentConfig(name="", model=None if alone else StudentVitConfig()), cfg, "model"),)
    for number, student in enumerate(cfg.students):
        check_folder_name(f"students.{number}.name", student.name)
    names = [student.name for student in cfg.students]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two students have the name {twice}: each has a folder of its own in export/")
    if taken := _EXPORT_FILES & set(names):
        raise ConfigError(f"a student cannot be called {min(taken)}, which is a file of an export")
    if len(names) > 1 and cfg.optim.clip is not None:
        raise ConfigError(
            f"optim.clip={cfg.optim.clip:g} is of the norm of all gradients together, and would let {len(names)} students "
            f"depend on each other: optim.clip=null, or train them one by one"
        )
    return tuple(
        _resolve_student(student, student, f"students.{number}.model") for number, student in enumerate(cfg.students)
    )


def _resolve_student(
    student: StudentConfig, settings: DistillConfig | StudentConfig, setting_name: str
) -> StudentConfig:
    """A student with what is stated of it, a model or a backbone."""
    model, backbone = settings.model or student.model, settings.backbone
    if model is not None and backbone is not None:
        raise ConfigError(
            f"{setting_name} and {setting_name.removesuffix('model')}backbone exclude each other: keep one of them"
        )
    if model is None and backbone is None:
        raise ConfigError(f"{setting_name} is missing: give it, or {setting_name.removesuffix('model')}backbone")
    return StudentConfig(name=student.name, model=model, backbone=backbone)


def _check_settings(cfg: DistillConfig) -> None:
    """What no teacher and no student can mend. Raises: ConfigError."""
    if cfg.layers and cfg.lesson not in ("layers", "relations"):
        raise ConfigError(
            f"layers are pairs of blocks, and lesson={cfg.lesson} compares none; remove them, or take lesson=layers or "
            f"relations"
        )
    twice = next((list(pair) for pair in cfg.layers if cfg.layers.count(pair) > 1), None)
    if twice is not None:
        raise ConfigError(f"layers has the pair {twice} twice")
    if cfg.lesson_cache.dir is not None and cfg.data.mix and not cfg.has_fixed_targets:
        raise ConfigError(
            "lesson_cache.dir keeps what the teacher says of each view, and with data.mix their number is not known; leave "
            "one of them out"
        )
    if cfg.lesson == "features" and not cfg.cls_weight and not cfg.patch_weight:
        raise ConfigError("cls_weight=0 and patch_weight=0 leave nothing to learn; give one of them a weight")
    if cfg.lesson == "token" and cfg.label_weight in (0, 1):
        raise ConfigError(
            f"lesson=token has two heads to teach, and label_weight={cfg.label_weight:g} leaves one out; give more than 0 and "
            f"less than 1, or take lesson=logits"
        )
