"""Timetable of a fine-tuning run: training steps, evaluations, checkpoints, the best evaluation, the export."""

import logging
from typing import Any

from finetune.evaluation_details import EvaluationDetails
from finetune.evaluation_record import keep_evaluation, publish_kept_evaluation, save_evaluation
from finetune.model import exported_weight_prefix
from finetune.task import FinetunePlan
from foveal.data.sampling.subset import eval_split
from foveal.engines.base import Engine
from foveal.errors import DataError
from foveal.optim.schedule import warmup_ema_decay
from foveal.training.checkpointing import resume
from foveal.training.evaluations import Metric, filter_up_to_step, find_best_step, is_patience_exhausted
from foveal.training.loop import build_stage_engine
from foveal.training.run import Run
from foveal.training.steps import finish_step, training_steps
from foveal.training.validation import evaluate_if_due, timed_evaluation

_log = logging.getLogger("foveal.finetune")


def fit(plan: FinetunePlan, run: Run) -> None:
    """Train from the first step, or the newest checkpoint, to the exported model."""
    cfg = plan.cfg
    setup = plan.task.build(plan, run.world.device)
    engine = build_stage_engine(setup, plan, run.world)
    start = resume(run, engine)
    _evaluate_if_due(plan, engine, run, start)  # a preempted attempt may have saved this step without evaluating it
    with training_steps(run, engine, setup.objective, start) as steps:
        while not _should_stop_early(plan, run) and (step := next(steps, None)) is not None:
            if cfg.ema_decay is not None and step.result is not None:
                engine.update_ema("averaged.", "encoder.", 1 - warmup_ema_decay(step.index, cfg.ema_decay))
            if finish_step(run, engine, step):
                return
            _evaluate_if_due(plan, engine, run, step.index)
    if _should_stop_early(plan, run):
        run.log_metrics()  # log.every need not divide the step that stopped early
        _report_early_stop(plan, run)
    elif plan.stop_step < plan.total_steps:
        return
    if plan.selection_metric is None:
        card = _export_card_fields(plan)
        try:
            with timed_evaluation(run):
                results, details = _evaluate_subsets(plan, engine, run, plan.total_steps, with_details=True)
        except DataError:
            # The trained weights are exported even if the evaluation data is unusable.
            run.export_weights(engine, plan.exported_encoder, **card)
            raise
        run.export_weights(engine, plan.exported_encoder, **card, metrics=results)
        save_evaluation(run, details, plan.total_steps, results)
        run.mark_finished(results)
    else:
        _finish_with_best(plan.selection_metric, run)


def _evaluate_if_due(plan: FinetunePlan, engine: Engine, run: Run, step: int) -> None:
    """Evaluate during training if the step is due; repeating a step overwrites its row.

    With early stopping the last step is due too, and the weights of the best evaluation so far are kept.
    """
    metric = plan.selection_metric
    last = plan.total_steps if metric else plan.total_steps - 1
    details: list[EvaluationDetails | None] = []

    def compute_metrics() -> dict[str, float]:
        is_candidate = metric is not None
        metrics, found = _evaluate_subsets(
            plan, engine, run, step, with_holdout=is_candidate, with_details=is_candidate
        )
        details.append(found)
        return metrics

    is_evaluated = evaluate_if_due(run, step, compute_metrics, last_step=last)
    if is_evaluated and metric and find_best_step(run.evaluations, metric) == step:
        card, metrics = _export_card_fields(plan), run.evaluations[step]
        with run.progress.activity("keeping the best weights"), run.throughput_meter.exclude_time():
            folder = run.exporter.write_weights(
                engine, plan.exported_encoder, **card, step=step, metrics=metrics, as_best=True
            )
            keep_evaluation(run, details[-1], step, metrics, folder)
        if run.world.rank == 0:
            # A resume from the oldest checkpoint knows the evaluations before it, and needs the best one's weights.
            earlier = filter_up_to_step(run.evaluations, run.checkpoint_store.oldest_resumable_step() - 1)
            run.exporter.remove_best(find_best_step(earlier, metric) if earlier else 0)


def _evaluate_subsets(
    plan: FinetunePlan, engine: Engine, run: Run, step: int, *, with_holdout: bool = True, with_details: bool = False
) -> tuple[dict[str, float], EvaluationDetails | None]:
    """Return the metrics on data.val or the fold, and on the holdout if there is one, by their logged names.

    ``with_details``: also what the run's end shows of the evaluation on data.val or the fold.
    """
    data, evaluated, details = plan.cfg.data, eval_split(plan.cfg.data), None
    split, subset = evaluated.split, evaluated.subset
    if with_details:
        metrics, details = plan.task.compute_metrics_and_details(engine, run, step, split=split, subset=subset)
    else:
        metrics = plan.task.compute_metrics(engine, run, step, split=split, subset=subset)
    named = {f"{evaluated.metric_prefix}_{metric}": value for metric, value in metrics.items()}
    if with_holdout and data.holdout_per_class:
        on_holdout = plan.task.compute_metrics(engine, run, step, split=data.train, subset="holdout")
        named |= {f"holdout_{metric}": value for metric, value in on_holdout.items()}
    return named, details


def _export_card_fields(plan: FinetunePlan) -> dict[str, Any]:
    """Return what an export's card says of this plan, and the name prefix of its weights."""
    return {
        "prefix": exported_weight_prefix(plan.cfg),
        "classes": plan.classes,
        "head": plan.task.head_card(plan),
    }


def _should_stop_early(plan: FinetunePlan, run: Run) -> bool:
    """Return whether patience is exhausted; False after a skipped update, which a rollback may follow."""
    early, metric = plan.cfg.early_stopping, plan.selection_metric
    if early is None or early.patience is None or metric is None:
        return False
    start = plan.fork.start_step if plan.fork is not None else 0  # the source's patience may be exhausted
    is_exhausted = is_patience_exhausted(run.evaluations, metric, early.patience, start)
    return is_exhausted and run.read_updates() and run.rollback.last_update_applied


def _report_early_stop(plan: FinetunePlan, run: Run) -> None:
    """Log, and record as the attempt's end, why the run stopped before its last step, if it did."""
    metric, early = plan.selection_metric, plan.cfg.early_stopping
    if metric is None or early is None or run.step >= plan.total_steps:
        return
    best = find_best_step(run.evaluations, metric)
    run.end_reason = (
        f"stopped early at step {run.step} of {plan.total_steps}: {early.patience} evaluations without a better "
        f"{metric.name} than {run.evaluations[best][metric.name]:.4f} at step {best}"
    )
    if not run.is_nested:
        _log.info("%s", run.end_reason)


def _finish_with_best(metric: Metric, run: Run) -> None:
    """Publish the best evaluation's weights and metrics as the run's export and summary."""
    best = find_best_step(run.evaluations, metric)
    export_folder = run.exporter.publish_best(best)
    run.tracker.log_file(export_folder / "card.json")
    publish_kept_evaluation(run, export_folder, best)
    run.mark_finished({"best_step": best}, best_metrics=run.evaluations[best])
    run.exporter.remove_best()
