"""The duration of saves, compared with Slurm's shutdown notice."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import Ranks, stage_named

from foveal.checkpoint.saver import CheckpointSaver, SaveResult
from foveal.distributed.preemption import LeaveRequest, ShutdownNotice
from foveal.distributed.world import World
from foveal.errors import LaunchError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training import checkpointing
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.progress import ProgressReporter
from foveal.training.run import Run


def _run(
    world: World, config: str, run: str, notice_seconds: float | None, save_seconds: float, *overrides: str
) -> list[str]:
    """Run a stage under a given notice of Slurm and duration of every save; return its warnings."""
    warnings: list[str] = []

    class WarningCollector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    stage, handler = stage_named("pretrain"), WarningCollector(logging.WARNING)
    publish = CheckpointSaver._publish_draft
    notice = None if notice_seconds is None else ShutdownNotice(notice_seconds, "--signal in the script")

    def slow(*arguments: Any) -> SaveResult | str:
        result = publish(*arguments)
        if isinstance(result, SaveResult):
            result = replace(result, write_seconds=save_seconds, seconds_without_overlap=save_seconds)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "read_shutdown_notice", lambda: notice)
        patch.setattr(CheckpointSaver, "_publish_draft", slow)
        logging.getLogger("foveal").addHandler(handler)
        try:
            settings = [f"run.dir={run}", "tracking.uri=null", "engine.kind=plain", *overrides]
            run_stage(stage, load_config(stage.config_class, "pretrain", config, settings), world)
        finally:
            logging.getLogger("foveal").removeHandler(handler)
    return warnings


def test_a_notice_that_is_too_short_is_refused_at_every_start(configs, one_rank: Ranks, tmp_path: Path) -> None:
    paths = str(configs["pretrain"]), str(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(
            LaunchError, match=r"takes 90 s here, .* ends a job 60 s .* --signal=USR1@270 .* FOVEAL_NOTICE=N"
        ):
            one_rank.call(_run, *paths, 60.0, 90.0, "run.stop_at_step=5")
    assert one_rank.call(_run, *paths, 100.0, 90.0, "run.stop_at_step=5") == [[]]
    # A resumed run has saved nothing yet, but its checkpoint stores the duration of the slowest save.
    with pytest.raises(LaunchError, match="takes 90 s here"):
        one_rank.call(_run, *paths, 60.0, 1.0, "run.stop_at_step=10")
    assert one_rank.call(_run, *paths, None, 1.0, "run.stop_at_step=10") == [[]]
    assert [row["step"] for row in read_rows_without_time(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 11))


def test_a_save_that_gets_slower_than_the_notice_is_warned_of(configs, one_rank: Ranks, tmp_path: Path) -> None:
    paths = str(configs["pretrain"]), str(tmp_path / "run")
    one_rank.call(_run, *paths, 60.0, 1.0, "run.stop_at_step=2")
    (warnings,) = one_rank.call(_run, *paths, 60.0, 90.0, "run.stop_at_step=6", "checkpoint.every=2")
    assert [warning.partition(":")[0] for warning in warnings] == [
        "a checkpoint took 90 s, and Slurm ends this job 60 s after its warning"
    ]


@pytest.mark.parametrize(
    ("applied", "leave", "is_pending", "warning"),
    [
        (True, None, True, None),
        (True, LeaveRequest(), True, None),
        (True, LeaveRequest(is_urgent=True), False, None),
        (True, LeaveRequest(is_urgent=True), True, "the time only suffices to finish the checkpoint in progress"),
        (False, LeaveRequest(), False, "whose update was refused"),
    ],
)
def test_what_is_saved_depends_on_update_request_and_the_save_in_progress(
    applied: bool,
    leave: LeaveRequest | None,
    is_pending: bool,
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started: list[int] = []
    monkeypatch.setattr(checkpointing, "_start_checkpoint", lambda run, _engine: started.append(run.step))
    run: Any = SimpleNamespace(
        step=7,
        log_metrics=lambda: None,
        rollback=SimpleNamespace(last_update_applied=applied),
        checkpoint_saver=SimpleNamespace(is_pending=is_pending),
        progress=ProgressReporter(),
    )
    engine: Any = None
    checkpointing.save_checkpoint(run, engine, leave)
    assert started == ([7] if warning is None else [])
    assert [message.partition("no checkpoint at step 7")[2].strip(",: ") for message in caplog.messages] == (
        [] if warning is None else [warning]
    )


@pytest.mark.parametrize("leave", [None, LeaveRequest(), LeaveRequest(is_urgent=True)])
def test_who_leaves_in_haste_does_not_wait_for_the_tracker(leave: LeaveRequest | None) -> None:
    skipped: list[bool] = []
    run: Any = SimpleNamespace(
        finish_checkpoint=lambda: None,
        preemption=SimpleNamespace(stop_reason="SIGUSR1", requested_again=False),
        plan=SimpleNamespace(total_steps=9),
        checkpoint_store=SimpleNamespace(latest_step=7),
        progress=ProgressReporter(),
        tracker=SimpleNamespace(skip_flush=lambda: skipped.append(True)),
        is_nested=True,
        _all_parts="",
    )
    Run.mark_preempted(run, 7, leave)
    assert run.is_preempted
    assert run.end_reason == "asked to leave (SIGUSR1): saved at step 7 of 9"
    assert bool(skipped) == (leave is not None and leave.is_urgent)
