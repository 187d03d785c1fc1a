"""A run that has too little memory says so, in one sentence, and is not started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import stage_named

from foveal.training.cli import main
from pretrain import train as pretraining

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"


class Left(Exception):
    """Instead of the end of this process."""


@pytest.fixture
def start(
    own_environment, configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    def end(code: int) -> None:
        raise Left(code)

    def run(*words: str) -> int:
        monkeypatch.setattr("foveal.training.cli._exit_process", end)
        place = f"run.dir={tmp_path / 'run'}"
        with pytest.raises(Left) as left:
            main(
                stage_named("pretrain"),
                [str(configs["pretrain"]), place, "engine.kind=plain", "tracking.uri=null", *words],
            )
        return left.value.args[0]

    return run


@pytest.mark.parametrize("where", ["build_stage_engine", "build"])
def test_it_is_one_sentence_and_no_requeue(
    where: str,
    start: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(WORDS)

    monkeypatch.setattr(pretraining, where, full)
    assert start() == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("foveal: ")]
    assert len(said) == 1
    assert said[0].startswith(
        "foveal: pretrain ran out of memory on rank 0, with 32 images per forward (CUDA out of memory)"
    )
    end = json.loads((tmp_path / "run" / "attempts" / "0001.end.json").read_text())
    assert end["code"] == 2
    assert "ran out of memory" in end["why"]


def test_a_plan_that_does_not_fit_is_one_too(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 7.11 PiB for an array")

    monkeypatch.setattr("foveal.training.plan.build_training_set", full)
    assert start("--check") == 2
    assert (
        "pretrain ran out of memory of the host on rank 0 before its first step (Unable to" in capsys.readouterr().err
    )
