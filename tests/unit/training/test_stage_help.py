"""--help of a stage: its main settings with what their definitions say, the configs that ship, examples."""

import pytest
from commands import complaints

from foveal.setting_docs import iter_setting_docs
from foveal.training.config_files import SHIPPED_CONFIGS
from foveal.training.stage import STAGE_NAMES, import_stage
from foveal.training.stage_help import format_rows, format_stage_help


@pytest.mark.parametrize("stage_name", STAGE_NAMES)
def test_help_shows_main_settings_configs_and_examples(stage_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stage = import_stage(stage_name)
    main = stage.config_class.main_settings
    assert len(set(main)) == len(main)
    assert 15 <= len(main) <= 20
    assert set(main) <= {doc.name for doc in iter_setting_docs(stage.config_class)}
    text = format_stage_help(stage)
    assert max(map(len, text.splitlines())) <= 110
    for line in ("  epochs=... (required)", "  seed=0 ", "  run.dir=null ", "null: runs/<name of the config>"):
        assert line in text
    for file in (SHIPPED_CONFIGS / stage_name).glob("*.yaml"):
        assert f"\n  {file.stem} " in text
    assert len(stage.examples) == 2
    for example in stage.examples:
        assert f"\n  {example}\n" in text
        assert not complaints(example)


def test_rows_are_wrapped_or_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = "word " * 30
    assert len(list(format_rows([("a", words)]))) == 2
    (line,) = format_rows([("a", words)], most_lines=1)
    assert line.startswith("  a  word")
    assert line.endswith(" ...")
    assert list(format_rows([])) == []
