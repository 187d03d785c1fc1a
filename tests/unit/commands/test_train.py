"""``foveal train STAGE``: the same command line as ``python -m STAGE.run``, from the same functions."""

import sys

import pytest
from typer.testing import CliRunner

from foveal import cli
from foveal.commands.lazy import LazyCommand
from foveal.commands.train import train
from foveal.errors import ConfigError
from foveal.training.cli import main
from foveal.training.stage import import_stage


def started(call, capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        call()
    said = capsys.readouterr()
    return done.value.code, said.out, said.err


def test_a_stage_answers_as_by_its_module(
    own_environment, digits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--check", "--ranks=2"], ["epochs=none"]):
        argv = ["digits", f"data.path={digits}", *words]
        monkeypatch.setattr(sys, "argv", ["foveal", "train", "pretrain", *argv])
        answer = started(cli.main, capsys)
        assert answer == started(lambda argv=argv: main(import_stage("pretrain"), argv), capsys)
        assert answer[0] == (2 if words == ["epochs=none"] else 0)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pretrian", "digits"], "there is no stage 'pretrian'. Did you mean 'pretrain'?"),
        (["mae_vit_b16", "epochs=1"], "the stage is missing: type foveal train pretrain mae_vit_b16 epochs=1"),
        (["x"], "'x' is no stage: foveal train pretrain|distill|finetune CONFIG "),
        (["epochs=1"], "'epochs=1' is no stage: "),
    ],
)
def test_a_word_that_is_no_stage_is_answered(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(words)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--process", "2"], "--process is no option of foveal train pretrain. Did you mean '--processes'?"),
        (["--epochs", "5"], "a setting has no dashes: type epochs=5"),
        (["--batch.global-size=8"], "a setting has no dashes: type batch.global_size=8"),
        (
            ["--minutes", "5"],
            "--minutes is no option of foveal train pretrain: there are --check, --ranks, --processes",
        ),
        (["--ranks", "two"], "argument --ranks: invalid int value: 'two'"),
    ],
)
def test_an_option_that_is_none_is_answered(
    words: list[str], sentence: str, own_environment, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, message = started(lambda: train(["pretrain", "digits", *words]), capsys)
    assert code == 2 and message.startswith("foveal: ") and sentence in message and message.count("\n") == 1


def test_processes_are_started_with_the_same_words(monkeypatch: pytest.MonkeyPatch, own_environment) -> None:
    calls: list[tuple[list[str], int]] = []
    monkeypatch.setattr("foveal.commands.train.run_local_ranks", lambda *call: calls.append(call) or 7)
    for words in (["--processes", "2", "digits", "seed=1"], ["digits", "seed=1", "--processes=2"]):
        with pytest.raises(SystemExit) as done:
            train(["pretrain", *words])
        assert done.value.code == 7
    assert calls == [(["-m", "foveal.cli", "train", "pretrain", "digits", "seed=1"], 2)] * 2
    for words in (["--processes", "0"], ["--processes=two"], ["--processes"]):
        with pytest.raises(ConfigError, match="--processes"):
            train(["pretrain", "digits", *words])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="exclude each other"):
        train(["pretrain", "digits", "--processes", "2"])


def test_help_names_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        code, out, err = started(lambda words=words: train(words), capsys)
        assert code == 0 and not err
        assert "foveal train pretrain digits" in out
        assert max(map(len, out.splitlines())) <= 80
    code, out, _ = started(lambda: train(["distill", "--help"]), capsys)
    assert code == 0
    assert "--processes N" in out
    assert out.startswith("usage: foveal train distill ")


def test_every_command_is_there_when_it_is_run() -> None:
    for name, entry in cli.COMMANDS.items():
        assert LazyCommand(name, entry).load().name == name
    helped = CliRunner().invoke(cli.app, ["train", "pretrain", "--help"])
    assert helped.exit_code == 0
    assert "usage: foveal train pretrain " in helped.output
