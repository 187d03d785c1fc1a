"""Timetable of a fine-tuning run: training steps, evaluations, checkpoints, the best evaluation, the export."""

from finetune.config import FinetuneConfig
from finetune.model import exported_weight_prefix
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
    """Train from the first step, or the newest checkpoint, to the exported model."""
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
    _evaluate_if_due(plan, engine, run, start)  # a preempted attempt may have saved this step without evaluating it
    with run.training_steps(engine, setup.objective, start) as steps:
        while not _should_stop_early(cfg, run) and (step := next(steps, None)) is not None:
            if cfg.ema_decay is not None and step.applied:
                engine.update_ema("averaged.", "encoder.", 1 - warmup_ema_decay(step.index, cfg.ema_decay))
            if is_due(step.index, cfg.log.every, plan.stop_step):
                run.log_metrics()
            preempted = run.check_preemption()
            if preempted or is_due(step.index, cfg.checkpoint.every, plan.stop_step):
                run.save_checkpoint(engine, step.index)
            if preempted:
                return run.mark_preempted(step.index)
            _evaluate_if_due(plan, engine, run, step.index)
    if _should_stop_early(cfg, run):
        run.log_metrics()  # log.every need not divide the step that stopped early
    elif plan.stop_step < plan.total_steps:
        return None
    if cfg.early_stopping is None:
        card = {"prefix": exported_weight_prefix(cfg), "classes": plan.classes, "head": task.head_card(plan)}
        try:
            results = _evaluate_subsets(cfg, engine, run, plan.total_steps)
        except DataError:
            # The trained weights are exported even if the evaluation data is unusable.
            run.export_weights(engine, plan.encoder, **card)
            raise
        run.export_weights(engine, plan.encoder, **card, metrics=results)
        run.mark_finished(results)
    else:
        _finish_with_best(cfg.early_stopping.metric, run)
    return None


def _evaluate_if_due(plan: FinetunePlan, engine: Engine, run: Run, step: int) -> None:
    """Evaluate during training if the step is due; repeating a step overwrites its row.

    With early stopping the last step is due too, and the weights of the best evaluation so far are kept.
    """
    cfg, early = plan.cfg, plan.cfg.early_stopping
    last = plan.total_steps if early else plan.total_steps - 1
    due_now = cfg.evaluate_every and (step % cfg.evaluate_every == 0 or step == plan.total_steps)
    if not due_now or not 0 < step <= last:
        return
    run.record_evaluation(step, _evaluate_subsets(cfg, engine, run, step, with_holdout=early is not None))
    if early and find_best_step(run.evaluations, early.metric) == step:
        card = {
            "prefix": exported_weight_prefix(cfg),
            "classes": plan.classes,
            "head": TASKS[cfg.data.labels].head_card(plan),
        }
        run.exporter.write_weights(engine, plan.encoder, **card, step=step, metrics=run.evaluations[step], as_best=True)
        if run.world.rank == 0:
            # A resume from the oldest checkpoint knows the evaluations before it, and needs the best one's weights.
            earlier = filter_up_to_step(run.evaluations, run.checkpoint_store.oldest_resumable_step() - 1)
            run.exporter.remove_best(find_best_step(earlier, early.metric) if earlier else 0)


def _evaluate_subsets(
    cfg: FinetuneConfig, engine: Engine, run: Run, step: int, *, with_holdout: bool = True
) -> dict[str, float]:
    """Return the metrics on data.val or the fold, and on the holdout if there is one, by their logged names."""
    compute_metrics = TASKS[cfg.data.labels].compute_metrics
    evaluated = eval_split(cfg.data)
    subsets: dict[str, tuple[str, SubsetName]] = {evaluated.metric_prefix: (evaluated.split, evaluated.subset)}
    if with_holdout and cfg.data.holdout_per_class:
        subsets["holdout"] = cfg.data.train, "holdout"
    return {
        f"{prefix}_{metric}": value
        for prefix, (split, subset) in subsets.items()
        for metric, value in compute_metrics(engine, run, step, split=split, subset=subset).items()
    }


def _should_stop_early(cfg: FinetuneConfig, run: Run) -> bool:
    """Return whether patience is exhausted; False after a skipped update, which a rollback may follow."""
    early = cfg.early_stopping
    if early is None or early.patience is None or not run.rollback.last_update_applied:
        return False
    return is_patience_exhausted(run.evaluations, early.metric, early.patience)


def _finish_with_best(metric: str, run: Run) -> None:
    """Publish the best evaluation's weights and metrics as the run's export and summary."""
    best = find_best_step(run.evaluations, metric)
    run.tracker.log_file(run.exporter.publish_best(best) / "card.json")
    run.mark_finished({"best_step": best}, best_metrics=run.evaluations[best])
    run.exporter.remove_best()
