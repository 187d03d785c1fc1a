"""The end of a run as its launch sees it: the report has a time limit, and a fold of an array has no page."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.training import launch


def test_a_report_that_takes_too_long_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipeline's folder may be a large one: /scratch, with other people's files."""
    settings = SimpleNamespace(run=SimpleNamespace(dir="run", pipeline=None), log=SimpleNamespace(report=True))
    plan: Any = SimpleNamespace(cfg=settings, science_settings=dict, summary_lines=list)
    run = SimpleNamespace(path=tmp_path, plan=plan, is_finished=True, is_part=False)

    @contextmanager
    def open_run(*_: Any) -> Iterator[Any]:
        yield run

    stage: Any = SimpleNamespace(
        name="pretrain", functions=SimpleNamespace(build_plan=lambda *_: plan, train=lambda *_: None)
    )
    monkeypatch.setattr(launch, "open_run", open_run)
    monkeypatch.setattr(launch, "_REPORT_SECONDS", 0.1)
    monkeypatch.setattr(launch, "_write_reports", lambda *_: time.sleep(3))
    alone = World(0, 1, 0, "none", torch.device("cpu"))
    assert launch._execute_run(stage, alone, Preemption(alone), plan.cfg)
    assert caplog.messages == [f"{tmp_path} is finished, and its report is not written (no answer within 0.1 s)"]
    caplog.clear()
    run.is_part = True
    assert launch._execute_run(stage, alone, Preemption(alone), plan.cfg)
    assert not caplog.messages, "the run of all folds has the page"
