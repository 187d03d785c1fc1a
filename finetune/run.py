"""Fine-tuning: ``accelerate launch finetune/run.py [CONFIG] [key=value ...]``, also under torchrun and srun.

Without CONFIG it is the demo's: it packs the digits if they are missing, and starts from the demo's pretrained encoder
if there is one, else from scratch, and says which.
"""

import logging
from pathlib import Path

import torch

from finetune.config import FinetuneConfig
from finetune.model import groups
from finetune.planning import FinetunePlan, plan
from finetune.tasks import TASKS
from finetune.trials import compare
from foveal.data.pack import pack_digits
from foveal.distributed.engine import Engine, build_engine
from foveal.distributed.world import seat
from foveal.door import Stage, main
from foveal.loop import Objective, Parts, due
from foveal.runtime import Run

_log = logging.getLogger("foveal.finetune")


def train(plan: FinetunePlan, run: Run) -> None:
    """One run, or a comparison of many."""
    if plan.cfg.trials is None:
        fit(plan, run)
    else:
        compare(plan, run, fit)


def fit(plan: FinetunePlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of the model."""
    cfg, task = plan.cfg, TASKS[plan.cfg.data.labels]
    made, sizes = parts(plan, run.world.device), {"at_once": plan.at_once, "accumulate": plan.micros}
    engine = build_engine(made.model, made.groups, cfg.optim, cfg.engine, run.world, **sizes)
    start = run.resume(engine)
    _evaluate(cfg, engine, run, start)  # what an attempt that saved and left had no time for
    with run.steps(engine, made.objective, start) as steps:
        for step in steps:
            if due(step.index, cfg.log.every, plan.stop):
                run.report()
            leaving = run.asked_to_leave()
            if leaving or due(step.index, cfg.checkpoint.every, plan.stop):
                run.save(engine, step.index)
            if leaving:
                return run.leave(step.index)
            _evaluate(cfg, engine, run, step.index)
    if plan.stop == plan.steps:
        results = {
            f"val_{name}": value
            for name, value in task.measure(engine, run, plan.steps, split=cfg.data.val, part="all").items()
        }
        if cfg.data.holdout_per_class:
            held_out = task.measure(engine, run, plan.steps, split=cfg.data.train, part="holdout")
            results |= {f"holdout_{name}": value for name, value in held_out.items()}
        run.export(engine, plan.encoder, prefix="encoder.", classes=plan.classes, head=task.head(plan))
        run.finish(results)
    return None


def _evaluate(cfg: FinetuneConfig, engine: Engine, run: Run, step: int) -> None:
    """Evaluate in the course of the training, where it is due; the same step twice leaves one row."""
    if cfg.evaluate_every and 0 < step < run.plan.steps and step % cfg.evaluate_every == 0:
        measure = TASKS[cfg.data.labels].measure
        run.evaluated(step, measure(engine, run, step, split=cfg.data.val, part="all"))


def parts(plan: FinetunePlan, _device: torch.device) -> Parts[Objective]:
    """The model of the plan, and what it learns; of a comparison, those of its first trial."""
    task = TASKS[plan.cfg.data.labels]
    model = task.build(plan)
    return Parts(model, groups(plan, model), task.objective(plan, model))


def demo() -> list[str]:
    """The command line of a start without CONFIG: the digits, packed if missing, from the demo's encoder if it is there."""
    root = Path(__file__).resolve().parents[1]
    digits, encoder = Path("data/digits"), Path("runs/demo/pretrain/export")
    if seat().rank == 0:
        pack_digits(digits)
    found = (encoder / "card.json").exists()
    _log.info(
        "no CONFIG: fine-tuning the digits %s", f"from {encoder}" if found else f"from scratch ({encoder} is not there)"
    )
    return [str(root / "configs" / "finetune" / "digits.yaml"), *([f"init={encoder}", "model=null"] if found else [])]


STAGE = Stage("finetune", FinetuneConfig, plan, train, parts, demo)

if __name__ == "__main__":
    main(STAGE)
