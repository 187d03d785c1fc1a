"""The timetable of fine-tuning: what happens after which step, which evaluation is the best, and what is left of a run."""

from finetune.config import FinetuneConfig
from finetune.model import export_prefix
from finetune.plan import FinetunePlan
from finetune.tasks.registry import TASKS
from foveal.data.sampling.subset import SubsetName, eval_split
from foveal.engines.base import Engine
from foveal.engines.build import build_engine
from foveal.errors import DataError
from foveal.optim.schedule import warmup_ema_decay
from foveal.training.evaluations import filter_up_to_step, find_best_step, is_patience_exhausted
from foveal.training.loop import is_due
from foveal.training.run import Run


def fit(plan: FinetunePlan, run: Run) -> None:
    """From the first step, or the newest checkpoint, to the export of the model."""
    cfg, task = plan.cfg, TASKS[plan.cfg.data.labels]
    setup = task.build(plan, run.world.device)
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
    _evaluate_if_due(plan, engine, run, start)  # what an attempt that saved and left had no time for
    with run.training_steps(engine, setup.objective, start) as steps:
        while not _should_stop_early(cfg, run) and (step := next(steps, None)) is not None:
            if cfg.average is not None and step.applied:
                engine.update_ema("averaged.", "encoder.", 1 - warmup_ema_decay(step.index, cfg.average))
            if is_due(step.index, cfg.log.every, plan.stop_step):
                run.log_metrics()
            leaving = run.check_preemption()
            if leaving or is_due(step.index, cfg.checkpoint.every, plan.stop_step):
                run.save_checkpoint(engine, step.index)
            if leaving:
                return run.end_preempted(step.index)
            _evaluate_if_due(plan, engine, run, step.index)
    if _should_stop_early(cfg, run):
        run.log_metrics()  # the last step was not due
    elif plan.stop_step < plan.total_steps:
        return None
    if cfg.early_stopping is None:
        about = {"prefix": export_prefix(cfg), "classes": plan.classes, "head": task.head_card(plan)}
        try:
            results = _evaluate_subsets(cfg, engine, run, plan.total_steps)
        except DataError:
            run.export_weights(
                engine, plan.encoder, **about
            )  # what was learned is not lost with what cannot be measured
            raise
        run.export_weights(engine, plan.encoder, **about, metrics=results)
        run.mark_finished(results)
    else:
        _finish_with_best(cfg.early_stopping.metric, run)
    return None


def _evaluate_if_due(plan: FinetunePlan, engine: Engine, run: Run, step: int) -> None:
    """Evaluate in the course of the training, where it is due; the same step twice leaves one row.

    With early stopping it is due after the last step too, and the weights are kept where it was the best so far.
    """
    cfg, early = plan.cfg, plan.cfg.early_stopping
    last = plan.total_steps if early else plan.total_steps - 1
    due_now = cfg.evaluate_every and (step % cfg.evaluate_every == 0 or step == plan.total_steps)
    if not due_now or not 0 < step <= last:
        return
    run.record_evaluation(step, _evaluate_subsets(cfg, engine, run, step, with_holdout=early is not None))
    if early and find_best_step(run.evaluations, early.metric) == step:
        about = {"prefix": export_prefix(cfg), "classes": plan.classes, "head": TASKS[cfg.data.labels].head_card(plan)}
        run.exporter.write_weights(
            engine, plan.encoder, **about, step=step, metrics=run.evaluations[step], as_best=True
        )
        if run.world.rank == 0:
            back = filter_up_to_step(
                run.evaluations, run.checkpoint_store.oldest_resumable_step() - 1
            )  # a resume there finds these evaluations
            run.exporter.remove_best(find_best_step(back, early.metric) if back else 0)


def _evaluate_subsets(
    cfg: FinetuneConfig, engine: Engine, run: Run, step: int, *, with_holdout: bool = True
) -> dict[str, float]:
    """The numbers on data.val, or the fold, and on the part that is held out, by the names they are logged under."""
    measure = TASKS[cfg.data.labels].compute_metrics
    on = eval_split(cfg.data)
    where: dict[str, tuple[str, SubsetName]] = {on.metric_prefix: (on.split, on.subset)}
    if with_holdout and cfg.data.holdout_per_class:
        where["holdout"] = cfg.data.train, "holdout"
    return {
        f"{name}_{number}": value
        for name, (split, part) in where.items()
        for number, value in measure(engine, run, step, split=split, subset=part).items()
    }


def _should_stop_early(cfg: FinetuneConfig, run: Run) -> bool:
    """Whether the best evaluation is old enough to stop; not after a refused update, which may be gone back from."""
    early = cfg.early_stopping
    if early is None or early.patience is None or not run.rollback.last_update_applied:
        return False
    return is_patience_exhausted(run.evaluations, early.metric, early.patience)


def _finish_with_best(metric: str, run: Run) -> None:
    """The export and the summary are those of the best evaluation."""
    best = find_best_step(run.evaluations, metric)
    run.tracker.log_file(run.exporter.publish_best(best) / "card.json")
    run.mark_finished({"best_step": best}, best_metrics=run.evaluations[best])
    run.exporter.remove_best()
