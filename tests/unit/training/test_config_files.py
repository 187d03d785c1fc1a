"""Where a config is searched: as a path, below the working directory, among those that ship."""

import os
from pathlib import Path

import pytest

from foveal.training.config_files import SHIPPED_CONFIGS, find_config, list_configs, read_summary

SHIPPED = SHIPPED_CONFIGS / "pretrain" / "digits.yaml"
LOCAL = Path("configs/pretrain/digits.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["digits", "digits.yaml", "pretrain/digits", "configs/pretrain/digits", "./configs/pretrain/digits.yaml"]
)
def test_a_config_that_ships_is_there_from_anywhere(text: str) -> None:
    assert find_config("pretrain", text) == SHIPPED
    assert SHIPPED.is_file()
    LOCAL.parent.mkdir(parents=True)
    LOCAL.touch()
    assert find_config("pretrain", text) == LOCAL  # a file of the working directory comes first


def test_a_path_is_a_path() -> None:
    for name in ("digits.yaml", "mine", "digits"):
        Path(name).touch()
    assert find_config("pretrain", "digits.yaml") == Path("digits.yaml")
    assert find_config("pretrain", "mine") == Path("mine")
    assert find_config("pretrain", "digits") == SHIPPED  # a name is a name
    assert find_config("pretrain", "x" * 300) == Path("x" * 300)  # reading it says what is wrong
    os.mkfifo("pipe.yaml")  # as of <(command)
    assert find_config("pretrain", "pipe.yaml") == Path("pipe.yaml")


@pytest.mark.parametrize("text", ["digit", "finetune/digits", "a/digits.yaml", "", "..", "pretrain", "."])
def test_what_is_not_there_is_none(text: str) -> None:
    assert find_config("pretrain", text) is None


def test_names_are_of_both_places(elsewhere: Path) -> None:
    LOCAL.parent.mkdir(parents=True)
    LOCAL.touch()
    (LOCAL.parent / "mine.yaml").touch()
    listed = list_configs("pretrain")
    assert listed["digits"] == LOCAL
    assert {"mine", "mae_vit_b16"} <= set(listed)


def test_a_summary_ends_where_the_command_begins(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# One line: the first,\n# and a second.\n# Command:  make\nepochs: 1\n")
    assert read_summary(file) == "One line: the first, and a second."
    file.write_text("epochs: 1\n# late\n")
    assert read_summary(file) == ""
