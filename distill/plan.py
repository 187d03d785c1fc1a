"""What the settings of distillation come to: teacher, students, and all that can be refused before a run begins."""

from dataclasses import dataclass, replace
from pathlib import Path

from distill.compatibility import Pupil, Taught, agreed_classes, fitted, taught_by
from distill.config import DistillConfig, StudentConfig, StudentVit
from distill.target import IN_CLASSES, Lesson
from foveal.config import check_plain
from foveal.errors import ConfigError
from foveal.models.backbone import times
from foveal.training.plan import Plan, planned
from foveal.weights.pretrained import Origin, origin_of

_FILES = {"card.json", "model.safetensors"}


@dataclass(frozen=True)
class DistillPlan(Plan):
    """A plan that knows the teacher, what it is asked, and who listens; ``classes`` are those that are learned, if any."""

    cfg: DistillConfig
    origin: Origin = None  # type: ignore[assignment]
    taught: Taught = None  # type: ignore[assignment]
    pupils: tuple[Pupil, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def lesson(self) -> Lesson:
        return self.taught.lesson

    def lines(self) -> list[str]:
        """The plan in words: what is taught to whom, and whose curve is its own on every cluster."""
        blocks = f", blocks {', '.join(map(str, self.lesson.blocks))}" if self.lesson.blocks else ""
        lines = [*super().lines(), f"lesson    {self.lesson.kind} of {self.cfg.teacher}{blocks}"]
        if self.taught.resized_from is not None:
            was, now = (times(size) for size in (self.taught.resized_from, self.cfg.data.image_size))
            lines.append(f"teacher   trained on images of {was}, sees {now} pixels")
        if self.cfg.lesson_cache.dir is not None:
            lines.append(f"answers   kept in {self.cfg.lesson_cache.dir}; a forecast counts the teacher in every step")
        for pupil in self.pupils:
            lines.append(f"student   {pupil.called}{pupil.says}")
            if pupil.mixes:
                lines.append(
                    f"beware    {pupil.called} has BatchNorm, which sees the images of a micro on its rank: its curve depends "
                    f"on ranks and images at once ({self.ranks} and {self.at_once} here)"
                )
        return lines


def plan(cfg: DistillConfig, ranks: int) -> DistillPlan:
    """Everything that can be refused before a run begins. Errors: ConfigError, DataError, ExportError."""
    students = students_of(cfg)
    _check_settings(cfg)
    origin = origin_of(Path(cfg.teacher), cfg.teacher_name, cfg.data)
    card, taught = origin.card, taught_by(cfg, origin.card)
    pupils = tuple(fitted(cfg, taught, each.name, each.model, each.backbone) for each in students)
    found = planned(
        DistillPlan,
        cfg,
        ranks,
        card=card,
        origin={"teacher": card.sha256} | ({"classes": ", ".join(card.classes)} if cfg.lesson in IN_CLASSES else {}),
        taught=taught,
        pupils=pupils,
    )
    found = replace(found, origin=origin)
    mixing = next((pupil for pupil in pupils if pupil.mixes), None)
    if mixing is not None and found.at_once == 1:
        raise ConfigError(
            f"{mixing.called} has BatchNorm, and a rank would hold one image at once: nothing to normalise it by; a larger "
            f"batch.at_once, or fewer ranks"
        )
    if cfg.lesson in IN_CLASSES:
        found = replace(found, classes=agreed_classes(cfg, taught, found.training.sources))
    return found


def students_of(cfg: DistillConfig) -> tuple[StudentConfig, ...]:
    """Every student, each with a model or a backbone; a student without a name is the only one. Errors: ConfigError."""
    alone = cfg.model is not None or cfg.backbone is not None
    if alone and cfg.students:
        raise ConfigError(
            f"{'model' if cfg.model else 'backbone'} and students exclude each other: put it among the students"
        )
    if not cfg.students:
        return (_one(StudentConfig(name="", model=None if alone else StudentVit()), cfg, "model"),)
    for number, student in enumerate(cfg.students):
        check_plain(f"students.{number}.name", student.name)
    names = [student.name for student in cfg.students]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two students have the name {twice}: each has a folder of its own in export/")
    if taken := _FILES & set(names):
        raise ConfigError(f"a student cannot be called {min(taken)}, which is a file of an export")
    if len(names) > 1 and cfg.optim.clip is not None:
        raise ConfigError(
            f"optim.clip={cfg.optim.clip:g} is of the norm of all gradients together, and would let {len(names)} students "
            f"depend on each other: optim.clip=null, or train them one by one"
        )
    return tuple(_one(student, student, f"students.{number}.model") for number, student in enumerate(cfg.students))


def _one(student: StudentConfig, stated: DistillConfig | StudentConfig, name: str) -> StudentConfig:
    """A student with what is stated of it, a model or a backbone."""
    model, backbone = stated.model or student.model, stated.backbone
    if model is not None and backbone is not None:
        raise ConfigError(f"{name} and {name.removesuffix('model')}backbone exclude each other: keep one of them")
    if model is None and backbone is None:
        raise ConfigError(f"{name} is missing: give it, or {name.removesuffix('model')}backbone")
    return StudentConfig(name=student.name, model=model, backbone=backbone)


def _check_settings(cfg: DistillConfig) -> None:
    """What no teacher and no student can mend. Errors: ConfigError."""
    if cfg.layers and cfg.lesson not in ("layers", "relations"):
        raise ConfigError(
            f"layers are pairs of blocks, and lesson={cfg.lesson} compares none; remove them, or take lesson=layers or "
            f"relations"
        )
    twice = next((list(pair) for pair in cfg.layers if cfg.layers.count(pair) > 1), None)
    if twice is not None:
        raise ConfigError(f"layers has the pair {twice} twice")
    if cfg.lesson_cache.dir is not None and cfg.data.mix and not cfg.still:
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
