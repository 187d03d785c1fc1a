"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from distill.config import DistillConfig
from distill.objective import DistillationLoss
from distill.plan import DistillPlan, plan
from distill.students import build_students
from distill.teacher import Teacher
from distill.teacher_cache import TeacherCache, TensorSpec, check_cache_size
from foveal.config import height_and_width
from foveal.engines.build import build_engine
from foveal.models.backbone import get_no_weight_decay_names
from foveal.models.patches import count_visible
from foveal.optim.optimizers import parameter_groups
from foveal.training.cli import Stage, main
from foveal.training.loop import TrainingSetup, is_due
from foveal.training.provenance import get_library_versions
from foveal.training.run import Run

# The settings that what a teacher says of a view depends on, beside what is inherited; the seed only where views differ.
_TARGET_SETTINGS = (
    "teacher_name",
    "mask_ratio",
    "data.image_size",
    "data.channels",
    "data.augment",
    "data.jpeg_scaling",
)
_VERSIONED_LIBRARIES = ("torch", "timm")


def train(plan: DistillPlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of every student."""
    cfg = plan.cfg
    setup = build(plan, run.world.device)
    engine = build_engine(
        setup.model,
        setup.param_groups,
        cfg.optim,
        cfg.engine,
        run.world,
        microbatch_size=plan.microbatch_size,
        accumulation_steps=plan.accumulation_steps,
    )
    start = run.resume(engine)
    with run.training_steps(engine, setup.objective, start) as steps:
        for step in steps:
            if is_due(step.index, cfg.log.every, plan.stop_step):
                run.log_metrics()
            leaving = run.check_preemption()
            if leaving or is_due(step.index, cfg.checkpoint.every, plan.stop_step):
                run.save_checkpoint(engine, step.index)
            if leaving:
                return run.end_preempted(step.index)
    if plan.stop_step == plan.total_steps:
        for number, pupil in enumerate(plan.student_specs):
            prefix = f"each.{number}.encoder."
            run.export_weights(engine, pupil.card, prefix=prefix, classes=plan.classes, name=pupil.name)
        run.mark_finished()
    return None


def build(plan: DistillPlan, device: torch.device) -> TrainingSetup[DistillationLoss]:
    """The students, freshly drawn, and their teacher on the device."""
    cfg, origin = plan.cfg, plan.teacher_source
    model = build_students(plan)
    place = device, cfg.engine.precision, cfg.data.image_size, origin.path
    teacher = Teacher(origin.load_weights(), origin.card, plan.target, *place)
    lessons = (
        None if cfg.lesson_cache.dir is None or device.type == "meta" else _open_teacher_cache(plan, teacher, device)
    )
    objective = DistillationLoss(
        teacher, cfg, [pupil.name for pupil in plan.student_specs], plan.mean, plan.std, lessons
    )
    undecayed = {
        f"each.{number}.encoder.{name}"
        for number, pupil in enumerate(plan.student_specs)
        if pupil.backbone is not None
        for name in get_no_weight_decay_names(model.get_submodule(f"each.{number}.encoder"))
    }
    return TrainingSetup(
        model, parameter_groups(model, cfg.optim, no_weight_decay=undecayed), objective, frozen_modules=(teacher.model,)
    )


def _open_teacher_cache(plan: DistillPlan, teacher: Teacher, device: torch.device) -> TeacherCache:
    """What the teacher has said, under everything that its answers depend on. Raises: ConfigError."""
    cfg = plan.cfg
    assert cfg.lesson_cache.dir is not None
    height, width = height_and_width(cfg.data.image_size)
    images = torch.zeros(1, cfg.data.channels, height, width, device=device)
    kept = None
    if plan.target.kind == "layers":
        patches = (height // plan.target.patch) * (width // plan.target.patch)
        kept = torch.arange(count_visible(patches, cfg.mask_ratio), device=device)[None]
    parts = [TensorSpec(tuple(each.shape[1:]), each.dtype) for each in teacher(images, kept)]
    rows = plan.training_set.num_ids * (1 if cfg.has_fixed_targets else cfg.epochs)
    check_cache_size(rows, parts, cfg.lesson_cache.gigabytes, "lesson_cache.gigabytes")
    facts: dict[str, Any] = {
        name: value for name, value in cfg.science_settings().items() if name.startswith(_TARGET_SETTINGS)
    }
    facts |= plan.inherited_science | {"lesson": asdict(plan.target), "precision": cfg.engine.precision}
    facts |= {"matmul": cfg.engine.matmul, "device": device.type} | (
        {} if cfg.has_fixed_targets else {"seed": cfg.seed}
    )
    facts |= {name: get_library_versions()[name] for name in _VERSIONED_LIBRARIES}
    return TeacherCache(Path(cfg.lesson_cache.dir), facts, rows, parts)


STAGE = Stage("distill", DistillConfig, plan, train, build)

if __name__ == "__main__":
    main(STAGE)
