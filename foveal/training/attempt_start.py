"""The start of an attempt on rank 0: its start step in the run directory, its line in the log, its tracker."""

import logging
from pathlib import Path

from foveal.distributed.world import World
from foveal.errors import AttemptSupersededError, FovealError
from foveal.runs.inputs import write_inputs
from foveal.runs.record import write_plan
from foveal.tracking import open_tracker
from foveal.tracking.tracker import Tracker
from foveal.training.lease import Lease
from foveal.training.meters.metric_accumulator import MetricRow
from foveal.training.plan import Plan
from foveal.training.provenance import collect_attempt_tags
from foveal.training.run_inputs import collect_inputs, describe_plan

_log = logging.getLogger(__name__)


def superseded_error(run_dir: Path) -> AttemptSupersededError:
    """Return the error of an attempt whose run another one has taken over."""
    return AttemptSupersededError(f"another attempt has taken over {run_dir}; this one writes nothing more")


def begin_attempt(
    stage_name: str,
    run_dir: Path,
    plan: Plan,
    world: World,
    lease: Lease,
    step: int,
    *,
    is_nested: bool,
    outer_tracker: Tracker | None,
) -> tuple[Tracker, MetricRow]:
    """Record the start step, open the tracker, and return it with the last row up to the step (empty: there is none).

    ``outer_tracker``: of the run that contains this one, if any.

    Raises: RestartLoopError if the maximal number of attempts in a row started at this step without progress,
    AttemptSupersededError if another attempt has taken over the run.
    """

    def raise_if_superseded() -> None:
        if lease.poll_superseded():
            raise superseded_error(run_dir)

    raise_if_superseded()  # loading may have taken minutes
    lease.record_start(step)
    # slurm/stage.sh counts the starts of a job without this line, or with the line of an earlier start.
    level = logging.DEBUG if is_nested else logging.INFO
    _log.log(level, "attempt %d begins at step %d: %s", lease.number, step, run_dir)
    cfg = plan.cfg
    tracker, last_row = open_tracker(
        run_dir, cfg.tracking, cfg.run.pipeline, step, lease.number, raise_if_superseded, outer_tracker
    )
    tags = collect_attempt_tags(world) | (plan.fork.tags() if plan.fork else {})
    tracker.log_settings(cfg.to_flat_dict() | plan.inherited_science, tags, cfg.changed_science())
    try:
        write_inputs(run_dir, collect_inputs(stage_name, run_dir, plan))
        write_plan(run_dir, describe_plan(stage_name, plan))
    except (OSError, FovealError) as error:  # of use to readers, and not needed
        _log.warning("inputs.json or plan.json is not written: %s", error)
    for name in ("config.yaml", *(["fork.json"] if plan.fork else [])):
        tracker.log_file(run_dir / name)
    return tracker, last_row
