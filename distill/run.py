"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill.config import DistillConfig
from distill.objective import Imitate
from distill.plan import DistillPlan, plan
from distill.students import build_students
from distill.teacher import Teacher
from distill.teacher_cache import Lessons, Part, check_bound
from foveal.config import height_and_width
from foveal.engines.build import build_engine
from foveal.models.backbone import undecayed_of
from foveal.models.patches import count_kept
from foveal.optim.optimizers import parameter_groups
from foveal.training.cli import Stage, main
from foveal.training.loop import Parts, due
from foveal.training.provenance import versions
from foveal.training.run import Run

# The settings that what a teacher says of a view depends on, beside what is inherited; the seed only where views differ.
_SEEN = ("teacher_name", "mask_ratio", "data.image_size", "data.channels", "data.augment", "data.jpeg_scaling")
_LIBRARIES = ("torch", "timm")


def train(plan: DistillPlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of every student."""
    cfg = plan.cfg
    made, sizes = parts(plan, run.world.device), {"at_once": plan.at_once, "accumulate": plan.micros}
    engine = build_engine(made.model, made.groups, cfg.optim, cfg.engine, run.world, **sizes)
    start = run.resume(engine)
    with run.steps(engine, made.objective, start) as steps:
        for step in steps:
            if due(step.index, cfg.log.every, plan.stop):
                run.report()
            leaving = run.asked_to_leave()
            if leaving or due(step.index, cfg.checkpoint.every, plan.stop):
                run.save(engine, step.index)
            if leaving:
                return run.leave(step.index)
    if plan.stop == plan.steps:
        for number, pupil in enumerate(plan.pupils):
            prefix = f"each.{number}.encoder."
            run.export(engine, pupil.card, prefix=prefix, classes=plan.classes, name=pupil.name)
        run.finish()
    return None


def parts(plan: DistillPlan, device: torch.device) -> Parts[Imitate]:
    """The students, freshly drawn, and their teacher on the device."""
    cfg, origin = plan.cfg, plan.origin
    model = build_students(plan)
    place = device, cfg.engine.precision, cfg.data.image_size, origin.place
    teacher = Teacher(origin.weights(), origin.card, plan.lesson, *place)
    lessons = None if cfg.lesson_cache.dir is None or device.type == "meta" else _lessons(plan, teacher, device)
    objective = Imitate(teacher, cfg, [pupil.name for pupil in plan.pupils], plan.mean, plan.std, lessons)
    undecayed = {
        f"each.{number}.encoder.{name}"
        for number, pupil in enumerate(plan.pupils)
        if pupil.backbone is not None
        for name in undecayed_of(model.get_submodule(f"each.{number}.encoder"))
    }
    return Parts(model, parameter_groups(model, cfg.optim, undecayed=undecayed), objective, frozen=(teacher.model,))


def _lessons(plan: DistillPlan, teacher: Teacher, device: torch.device) -> Lessons:
    """What the teacher has said, under everything that its answers depend on. Errors: ConfigError."""
    cfg = plan.cfg
    assert cfg.lesson_cache.dir is not None
    height, width = height_and_width(cfg.data.image_size)
    images = torch.zeros(1, cfg.data.channels, height, width, device=device)
    kept = None
    if plan.lesson.kind == "layers":
        patches = (height // plan.lesson.patch) * (width // plan.lesson.patch)
        kept = torch.arange(count_kept(patches, cfg.mask_ratio), device=device)[None]
    parts = [Part(tuple(each.shape[1:]), each.dtype) for each in teacher(images, kept)]
    rows = plan.training.ids * (1 if cfg.still else cfg.epochs)
    check_bound(rows, parts, cfg.lesson_cache.gigabytes, "lesson_cache.gigabytes")
    facts: dict[str, Any] = {name: value for name, value in cfg.science().items() if name.startswith(_SEEN)}
    facts |= plan.inherited | {"lesson": asdict(plan.lesson), "precision": cfg.engine.precision}
    facts |= {"matmul": cfg.engine.matmul, "device": device.type} | ({} if cfg.still else {"seed": cfg.seed})
    facts |= {name: versions()[name] for name in _LIBRARIES}
    return Lessons(Path(cfg.lesson_cache.dir), facts, rows, parts)


STAGE = Stage("distill", DistillConfig, plan, train, parts)

if __name__ == "__main__":
    main(STAGE)
