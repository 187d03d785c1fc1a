"""Distillation: ``python -m distill.run CONFIG [key=value ...]``, alone, under torchrun, or under srun."""

from pathlib import Path

import torch

from distill.config import DistillConfig, DistillPlan, plan
from distill.objective import Imitate
from distill.teacher import Teacher
from foveal.distributed.engine import build_engine
from foveal.door import Stage, main
from foveal.loop import Parts, due
from foveal.models.heads import Student
from foveal.models.vit import build_encoder, encoder_card
from foveal.optim import parameter_groups
from foveal.runtime import Run
from foveal.seeding import key


def train(plan: DistillPlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of the student's encoder."""
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
        run.export(engine, encoder_card(cfg.model, cfg.data.image_size, cfg.data.channels), prefix="encoder.")
        run.finish()
    return None


def parts(plan: DistillPlan, device: torch.device) -> Parts[Imitate]:
    """The student, freshly drawn, and its teacher on the device."""
    cfg = plan.cfg
    torch.manual_seed(key(cfg.seed, "weights"))
    encoder = build_encoder(cfg.model, image_size=cfg.data.image_size, channels=cfg.data.channels)
    model = Student(encoder, plan.teacher_width)
    teacher = Teacher(Path(cfg.teacher), device, cfg.engine.precision, cfg.data.image_size)
    objective = Imitate(teacher, cfg.distance, cfg.cls_weight, cfg.patch_weight, plan.mean, plan.std)
    return Parts(model, parameter_groups(model, cfg.optim), objective, frozen=(teacher.encoder,))


STAGE = Stage("distill", DistillConfig, plan, train, parts)

if __name__ == "__main__":
    main(STAGE)
