"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from pathlib import Path

import torch

from distill.config import DistillConfig, DistillPlan, plan
from distill.objective import Imitate
from distill.students import build_students
from distill.teacher import Teacher
from foveal.checkpoint.export import read_export
from foveal.distributed.engine import build_engine
from foveal.door import Stage, main
from foveal.loop import Parts, due
from foveal.optim import parameter_groups
from foveal.runtime import Run


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
    cfg, folder = plan.cfg, Path(plan.cfg.teacher)
    model = build_students(plan)
    weights, card = read_export(folder)
    teacher = Teacher(weights, card, plan.lesson, device, cfg.engine.precision, cfg.data.image_size, folder)
    objective = Imitate(teacher, cfg, [pupil.name for pupil in plan.pupils], plan.mean, plan.std)
    return Parts(model, parameter_groups(model, cfg.optim), objective, frozen=(teacher.model,))


STAGE = Stage("distill", DistillConfig, plan, train, parts)

if __name__ == "__main__":
    main(STAGE)
