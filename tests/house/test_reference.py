"""docs/configuration.md is what the settings say, and the reference says all of it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from house import ROOT
from pydantic import Field
from pydantic_core import PydanticUndefined

from foveal.commands.reference import get_stage_configs, main, render_reference
from foveal.config import Config, machine, science
from foveal.setting_docs import SettingDoc, iter_setting_docs


class Kettle(Config):
    watts: int = science(2000, "What it draws.", gt=0, le=3000)
    colours: tuple[str, ...] = machine((), "For show | for sale.")


class Breakfast(Config):
    """What is eaten first."""

    eggs: int = science(description="How many.", ge=0)
    style: Literal["boiled", "fried"] | None = science(None, "How.")
    split: tuple[Annotated[float, Field(ge=0)], float] = science((0.5, 0.5), "Between two.")
    kettle: Kettle = Kettle(watts=1000)
    spare: Kettle | None = machine(None, "Another one.")
    notes: dict[str, Any] = machine(default_factory=dict)


def test_every_setting_has_its_line() -> None:
    assert list(iter_setting_docs(Breakfast)) == [
        SettingDoc("eggs", "integer", PydanticUndefined, "≥ 0", "science", "How many."),
        SettingDoc("style", "`boiled` or `fried` or null", None, "", "science", "How."),
        SettingDoc("split", "[number, number]", (0.5, 0.5), "each ≥ 0", "science", "Between two."),
        SettingDoc("kettle.watts", "integer", 1000, "> 0, ≤ 3000", "science", "What it draws."),
        SettingDoc("kettle.colours", "list of text", (), "", "machine", "For show | for sale."),
        SettingDoc("spare", "section or null", None, "", "machine", "Another one."),
        SettingDoc("spare.watts", "integer", 2000, "> 0, ≤ 3000", "machine", "What it draws."),
        SettingDoc("spare.colours", "list of text", (), "", "machine", "For show | for sale."),
        SettingDoc("notes", "mapping", {}, "", "machine", ""),
    ]


def test_names_and_halves_are_those_of_a_config() -> None:
    """The reference walks the classes, Config walks the values: they must agree on what is science."""
    breakfast = Breakfast(eggs=2, spare=Kettle())
    halves = {setting.name: setting.kind for setting in iter_setting_docs(Breakfast) if setting.name != "spare"}
    assert list(halves) == list(breakfast.to_flat_dict())
    assert [name for name, half in halves.items() if half == "science"] == list(breakfast.science_settings())


def test_what_stages_share_stands_once() -> None:
    class Supper(Config):
        """What is eaten last."""

        eggs: int = science(description="How many.", ge=0)
        kettle: Kettle = Kettle(watts=900)

    text = render_reference({"breakfast": Breakfast, "supper": Supper})
    assert text.count("| `eggs` | integer | required | ≥ 0 | science | How many. |") == 1
    assert text.index("`eggs`") < text.index("## breakfast\n\nWhat is eaten first.\n")
    assert "| `kettle.watts` | integer | `1000` | > 0, ≤ 3000 | science | What it draws. |" in text
    assert "| `kettle.watts` | integer | `900` | > 0, ≤ 3000 | science | What it draws. |" in text
    assert "| `kettle.colours` | list of text | `[]` |  | machine | For show \\| for sale. |" in text


def test_the_document_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--check", str(ROOT / "docs" / "configuration.md")])
    assert code == 0, capsys.readouterr().err


def test_an_old_document_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "configuration.md"
    old.write_text(render_reference(get_stage_configs()).replace("science", "silence"))
    assert main(["--check", str(old)]) == 1
    assert capsys.readouterr().err == f"foveal: {old} is not what the settings say; run make docs\n"
