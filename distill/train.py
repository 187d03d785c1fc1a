"""Distillation: build students and teacher, train the students, export each."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from distill.objective import DistillationLoss
from distill.plan import DistillPlan, plan_distillation
from distill.students import build_students
from distill.teacher import Teacher
from distill.teacher_cache import TeacherCache, TensorSpec, check_cache_size
from foveal.config import height_and_width
from foveal.engines.attention import apply_attention, has_explicit_attention
from foveal.models.backbone import get_no_weight_decay_names
from foveal.models.patches import count_visible
from foveal.optim.optimizers import parameter_groups
from foveal.renames import restore_names
from foveal.training.checkpointing import resume
from foveal.training.loop import TrainingSetup, build_stage_engine
from foveal.training.provenance import get_library_versions
from foveal.training.run import Run
from foveal.training.stage import StageFunctions
from foveal.training.steps import finish_step, training_steps
from foveal.training.validation import evaluate_encoders, evaluate_if_due

# Settings on which the teacher's outputs depend, besides inherited science; the seed only if views differ by epoch.
_TARGET_SETTINGS = (
    "teacher_name",
    "mask_ratio",
    "data.image_size",
    "data.channels",
    "data.augment",
    "data.jpeg_scaling",
    "data.decode_version",
    "data.weights_version",
)
_VERSIONED_LIBRARIES = ("torch", "timm")


def train(plan: DistillPlan, run: Run) -> None:
    """Train from the first step or the newest checkpoint, then export every student."""
    setup = build(plan, run.world.device)
    engine = build_stage_engine(setup, plan, run.world)
    start = resume(run, engine)
    names = [student.name for student in plan.student_specs]
    uncached_objective = replace(setup.objective, teacher_cache=None)  # the cache has rows of training images only

    def evaluate(step: int) -> None:
        evaluate_if_due(run, step, lambda: evaluate_encoders(engine, run, uncached_objective, step, names))

    evaluate(start)  # a preempted attempt may have saved this step without evaluating it
    with training_steps(run, engine, setup.objective, start) as steps:
        for step in steps:
            if finish_step(run, engine, step):
                return
            evaluate(step.index)
    if plan.stop_step == plan.total_steps:
        metrics = run.evaluations.get(plan.total_steps, {})
        for number, student in enumerate(plan.student_specs):
            prefix = f"each.{number}.encoder."
            run.export_weights(
                engine, student.card, prefix=prefix, classes=plan.classes, name=student.name, metrics=metrics
            )
        run.mark_finished(metrics)


def build(plan: DistillPlan, device: torch.device) -> TrainingSetup[DistillationLoss]:
    """Return the freshly initialised students, and a loss with the teacher on the device."""
    cfg, source = plan.cfg, plan.teacher_source
    model = build_students(plan)
    teacher = Teacher(
        source.load_weights(),
        source.card,
        plan.target,
        device,
        cfg.engine.precision,
        cfg.data.image_size,
        source.path,
    )
    apply_attention(teacher.model, cfg.engine)
    uses_cache = cfg.teacher_cache.dir is not None and device.type != "meta"
    teacher_cache = _open_teacher_cache(plan, teacher, device) if uses_cache else None
    student_names = [student.name for student in plan.student_specs]
    objective = DistillationLoss(teacher, cfg, student_names, plan.mean, plan.std, teacher_cache)
    undecayed = {
        f"each.{number}.encoder.{name}"
        for number, student in enumerate(plan.student_specs)
        if student.backbone is not None
        for name in get_no_weight_decay_names(model.get_submodule(f"each.{number}.encoder"))
    }
    return TrainingSetup(
        model, parameter_groups(model, cfg.optim, no_weight_decay=undecayed), objective, frozen_modules=(teacher.model,)
    )


def _open_teacher_cache(plan: DistillPlan, teacher: Teacher, device: torch.device) -> TeacherCache:
    """Open the cache that is keyed by everything the teacher's outputs depend on. Raises: ConfigError."""
    cfg = plan.cfg
    assert cfg.teacher_cache.dir is not None
    height, width = height_and_width(cfg.data.image_size)
    images = torch.zeros(1, cfg.data.channels, height, width, device=device)
    visible_indices = None
    if plan.target.kind == "layers":
        num_patches = (height // plan.target.patch) * (width // plan.target.patch)
        visible_indices = torch.arange(count_visible(num_patches, cfg.mask_ratio), device=device)[None]
    tensor_specs = [TensorSpec(tuple(output.shape[1:]), output.dtype) for output in teacher(images, visible_indices)]
    num_rows = plan.training_set.num_ids * (1 if cfg.has_epoch_invariant_targets else cfg.epochs)
    check_cache_size(num_rows, tensor_specs, cfg.teacher_cache.max_gigabytes, "teacher_cache.max_gigabytes")
    # Caches of earlier versions stay in use.
    science = restore_names(cfg.without_neutral(cfg.science_settings()))
    key_fields: dict[str, Any] = {name: value for name, value in science.items() if name.startswith(_TARGET_SETTINGS)}
    key_fields |= {name: value for name, value in plan.inherited_science.items() if name != "inherited.fork"}
    key_fields |= {
        "lesson": asdict(plan.target),
        "precision": cfg.engine.precision,
        "matmul": cfg.engine.float32_matmul_precision,
        "device": device.type,
    }
    if has_explicit_attention(teacher.model):  # earlier caches stay in use
        key_fields["attention"] = cfg.engine.max_explicit_attention_tokens
    if not cfg.has_epoch_invariant_targets:
        key_fields["seed"] = cfg.seed
    key_fields |= {name: get_library_versions()[name] for name in _VERSIONED_LIBRARIES}
    return TeacherCache(Path(cfg.teacher_cache.dir), key_fields, num_rows, tensor_specs)


FUNCTIONS = StageFunctions(plan_distillation, train, build)
