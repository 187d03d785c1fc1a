"""The exit code of a stage: its error's own, also as one of several ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import stage_named

from foveal.distributed.world import World
from foveal.errors import DataError, FovealError, TrainingDivergedError
from foveal.training import cli, launch


class ProcessEnd(BaseException):
    """Stands for the end of the process without the interpreter's finalization, which may abort with code 134."""


@pytest.fixture
def exit_code_of(
    own_environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[BaseException | None], int]:
    """Run a stage as rank 0 of two that raises an error, and return the code with which its process ends."""

    @contextmanager
    def two_ranks(*_: Any) -> Iterator[World]:
        yield World(0, 2, 0, "environment", torch.device("cpu"))

    def end(code: int) -> None:
        raise ProcessEnd(code)

    def run(error: BaseException | None) -> int:
        def fail(*_: Any) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(launch, "run_stage", fail)
        with pytest.raises(ProcessEnd) as ended:
            cli.main(stage_named("pretrain"), ["digits", f"run.dir={tmp_path}", "engine.kind=plain"])
        return ended.value.args[0]

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(World, "barrier", lambda _: None)
    monkeypatch.setattr(launch, "init_world", two_ranks)
    monkeypatch.setattr(cli, "_exit_process", end)
    return run


def test_several_ranks_end_with_the_code_of_their_error(
    exit_code_of: Callable[[BaseException | None], int], capsys: pytest.CaptureFixture[str]
) -> None:
    errors: list[FovealError] = [DataError("no shards"), TrainingDivergedError("not finite")]
    assert [exit_code_of(error) for error in (None, *errors)] == [0, 2, 3]
    assert capsys.readouterr().err.splitlines()[-2:] == ["foveal: no shards", "foveal: not finite"]


def test_ctrl_c_before_the_run_is_one_line(
    exit_code_of: Callable[[BaseException | None], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == (
        "foveal: stopped by Ctrl-C before anything was trained; the same command starts again\n"
    )


def test_several_ranks_end_with_1_and_a_traceback_on_any_other_error(
    exit_code_of: Callable[[BaseException | None], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(ValueError("a bug")) == 1
    error_output = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error_output
    assert error_output.rstrip().endswith("ValueError: a bug")
