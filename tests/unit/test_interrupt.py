"""The last line of a process: one sentence, at Ctrl-C, and in torchrun's report on a failed rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from foveal import cli
from foveal.commands import attempts, train
from foveal.interrupt import INTERRUPTED_EXIT_CODE, report_error


def test_the_report_of_torchrun_quotes_the_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    report_error("data.path: no such folder: nowhere")
    report_error("data.path: no such folder: nowhere (rank 1 of 2)", on_stderr=False)
    assert capsys.readouterr().err == "foveal: data.path: no such folder: nowhere\n"
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(file))
    *_, last, border = ChildFailedError("pretrain.run", {1: failure}).format_msg().splitlines()
    assert last.endswith(": foveal: data.path: no such folder: nowhere (rank 1 of 2)")
    assert set(border) == {"="}
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    report_error("still said")


def test_ctrl_c_during_imports_is_one_line_whatever_they_catch() -> None:
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
from foveal.interrupt import exit_at_once_on_interrupt
with exit_at_once_on_interrupt("stopped"):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        raise ImportError("a part failed to import") from error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "foveal: stopped\n")


def test_ctrl_c_in_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(attempts, "list_attempts", lambda _: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["foveal", "attempts", str(tmp_path)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "foveal: stopped by Ctrl-C; the same command starts again\n")


def test_nothing_is_added_to_the_last_sentence_of_the_ranks_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run_local_ranks", lambda *_: INTERRUPTED_EXIT_CODE)
    monkeypatch.setattr(sys, "argv", ["foveal", "train", "pretrain", "digits", "--processes", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == INTERRUPTED_EXIT_CODE
    assert capsys.readouterr() == ("", "")
