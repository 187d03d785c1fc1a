"""Checkpoints of a run as its steps see them: how long they take, and whether Slurm leaves them the time."""

import logging
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named

from foveal.distributed.preemption import ShutdownNotice
from foveal.distributed.world import World
from foveal.errors import LaunchError
from foveal.tracking.jsonl import read_metric_rows
from foveal.training import checkpointing
from foveal.training.cli import load_config, run_stage


def _run(world: World, config: str, run: str, told: float | None, took: float, *overrides: str) -> list[str]:
    """Run a stage under a Slurm that gives ``told`` seconds of notice, where every save takes ``took``; its warnings."""
    said: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    stage, handler = stage_named("pretrain"), Told(logging.WARNING)
    note = checkpointing.CheckpointSaver._record_saved

    def slow(self: checkpointing.CheckpointSaver, saved: Any) -> None:
        if saved is not None:
            saved = checkpointing.SaveResult(saved.step, saved.stall_seconds, took, took, saved.bytes)
        note(self, saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpointing, "notice", lambda: None if told is None else ShutdownNotice(told, "--signal in the script")
        )
        patch.setattr(checkpointing.CheckpointSaver, "_record_saved", slow)
        logging.getLogger("foveal").addHandler(handler)
        try:
            words = [f"run.dir={run}", "tracking.uri=null", "engine.kind=plain", *overrides]
            run_stage(stage, load_config(stage.config_class, "pretrain", config, words), world)
        finally:
            logging.getLogger("foveal").removeHandler(handler)
    return said


def test_a_notice_that_is_too_short_is_refused_at_every_start(configs, one_rank: Ranks, tmp_path: Path) -> None:
    place = str(configs["pretrain"]), str(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(
            LaunchError, match=r"takes 90 s here, .* ends a job 60 s .* --signal=USR1@270 .* FOVEAL_NOTICE=N"
        ):
            one_rank.call(_run, *place, 60.0, 90.0, "run.stop_at=5")
    assert one_rank.call(_run, *place, 100.0, 90.0, "run.stop_at=5") == [[]]
    with pytest.raises(
        LaunchError, match="takes 90 s here"
    ):  # a resumed run has saved nothing yet, and knows it all the same
        one_rank.call(_run, *place, 60.0, 1.0, "run.stop_at=10")
    assert one_rank.call(_run, *place, None, 1.0, "run.stop_at=10") == [[]]
    assert [row["step"] for row in read_metric_rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 11))


def test_a_save_that_gets_slower_than_the_notice_is_warned_of(configs, one_rank: Ranks, tmp_path: Path) -> None:
    place = str(configs["pretrain"]), str(tmp_path / "run")
    one_rank.call(_run, *place, 60.0, 1.0, "run.stop_at=2")
    (said,) = one_rank.call(_run, *place, 60.0, 90.0, "run.stop_at=6", "checkpoint.every=2")
    assert [words.partition(":")[0] for words in said] == [
        "a checkpoint took 90 s, and Slurm ends this job 60 s after it was told"
    ]
