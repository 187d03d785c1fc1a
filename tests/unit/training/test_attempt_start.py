"""The start of an attempt: what readers of a run directory would miss ends no training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import UNSEEN, stage_named

from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import CheckpointError
from foveal.training import attempt_start
from foveal.training.run_directory import open_run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "error"),
    [("write_inputs", OSError(116, "Stale file handle")), ("write_plan", CheckpointError("damaged"))],
)
def test_records_for_readers_may_fail(
    name: str,
    error: Exception,
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(attempt_start, name, fail)
    stage = stage_named("pretrain")
    overrides = ["engine.kind=plain", f"run.dir={tmp_path / 'run'}", *UNSEEN]
    plan = stage.functions.build_plan(stage.config_class.load(configs["pretrain"], overrides), 1)
    with open_run("pretrain", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        run.start_attempt()
    assert f"inputs.json or plan.json is not written: {error}" in caplog.messages
