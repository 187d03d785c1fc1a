"""The timetable of fine-tuning: what happens after which step, which evaluation is the best, and what is left of a run."""

from finetune.config import FinetuneConfig
from finetune.model import exported
from finetune.plan import FinetunePlan
from finetune.tasks.registry import TASKS
from foveal.data.sampling.subset import PartName, judge
from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.errors import DataError
from foveal.optim.schedule import early_average
from foveal.training.evaluations import best_step, is_over, until
from foveal.training.loop import due
from foveal.training.run import Run


def fit(plan: FinetunePlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of the model."""
    cfg, task = plan.cfg, TASKS[plan.cfg.data.labels]
    made, sizes = task.parts(plan, run.world.device), {"at_once": plan.at_once, "accumulate": plan.micros}
    engine = build_engine(made.model, made.groups, cfg.optim, cfg.engine, run.world, **sizes)
    start = run.resume(engine)
    _evaluate(plan, engine, run, start)  # what an attempt that saved and left had no time for
    with run.steps(engine, made.objective, start) as steps:
        while not _is_over(cfg, run) and (step := next(steps, None)) is not None:
            if cfg.average is not None and step.applied:
                engine.average("averaged.", "encoder.", 1 - early_average(step.index, cfg.average))
            if due(step.index, cfg.log.every, plan.stop):
                run.report()
            leaving = run.asked_to_leave()
            if leaving or due(step.index, cfg.checkpoint.every, plan.stop):
                run.save(engine, step.index)
            if leaving:
                return run.leave(step.index)
            _evaluate(plan, engine, run, step.index)
    if _is_over(cfg, run):
        run.report()  # the last step was not due
    elif plan.stop < plan.steps:
        return None
    if cfg.early_stopping is None:
        about = {"prefix": exported(cfg), "classes": plan.classes, "head": task.head(plan)}
        try:
            results = _measured(cfg, engine, run, plan.steps)
        except DataError:
            run.export(engine, plan.encoder, **about)  # what was learned is not lost with what cannot be measured
            raise
        run.export(engine, plan.encoder, **about, results=results)
        run.finish(results)
    else:
        _leave_the_best(cfg.early_stopping.metric, run)
    return None


def _evaluate(plan: FinetunePlan, engine: Engine, run: Run, step: int) -> None:
    """Evaluate in the course of the training, where it is due; the same step twice leaves one row.

    With early stopping it is due after the last step too, and the weights are kept where it was the best so far.
    """
    cfg, early = plan.cfg, plan.cfg.early_stopping
    last = plan.steps if early else plan.steps - 1
    due_now = cfg.evaluate_every and (step % cfg.evaluate_every == 0 or step == plan.steps)
    if not due_now or not 0 < step <= last:
        return
    run.evaluated(step, _measured(cfg, engine, run, step, held_out=early is not None))
    if early and best_step(run.scores, early.metric) == step:
        about = {"prefix": exported(cfg), "classes": plan.classes, "head": TASKS[cfg.data.labels].head(plan)}
        run.exports.write(engine, plan.encoder, **about, step=step, metrics=run.scores[step], aside=True)
        if run.world.rank == 0:
            back = until(run.scores, run.store.reach() - 1)  # a resume there finds these evaluations
            run.exports.forget(best_step(back, early.metric) if back else 0)


def _measured(cfg: FinetuneConfig, engine: Engine, run: Run, step: int, *, held_out: bool = True) -> dict[str, float]:
    """The numbers on data.val, or the fold, and on the part that is held out, by the names they are logged under."""
    measure = TASKS[cfg.data.labels].measure
    on = judge(cfg.data)
    where: dict[str, tuple[str, PartName]] = {on.name: (on.split, on.part)}
    if held_out and cfg.data.holdout_per_class:
        where["holdout"] = cfg.data.train, "holdout"
    return {
        f"{name}_{number}": value
        for name, (split, part) in where.items()
        for number, value in measure(engine, run, step, split=split, part=part).items()
    }


def _is_over(cfg: FinetuneConfig, run: Run) -> bool:
    """Whether the best evaluation is old enough to stop; not after a refused update, which may be gone back from."""
    early = cfg.early_stopping
    if early is None or early.patience is None or not run.recovery.clean:
        return False
    return is_over(run.scores, early.metric, early.patience)


def _leave_the_best(metric: str, run: Run) -> None:
    """The export and the summary are those of the best evaluation."""
    best = best_step(run.scores, metric)
    run.tracker.file(run.exports.leave(best) / "card.json")
    run.finish({"best_step": best}, known=run.scores[best])
    run.exports.forget()
