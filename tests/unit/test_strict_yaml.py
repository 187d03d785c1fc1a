"""Files that are no config are refused soon, whatever they hold."""

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from foveal import strict_yaml
from foveal.errors import ConfigError
from foveal.strict_yaml import read_yaml

_NINE = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (_NINE, r"has more than 100,000 values"),
        ("[" * 10_000, r"nested too deeply"),
        ("{a: " * 5_000, r"nested too deeply"),
        ("a: &a [*a]", r"inside of itself"),
        ("x" * (1 << 18) + "x", r"has more than 262,144 characters"),
        ("epochs: 2024-13-45", r"not valid YAML \(month must be in 1\.\.12"),
        ("epochs: " + "9" * 5000, r"not valid YAML \(a number of 5000 digits"),
        ("epochs: !!int many", r"not valid YAML \(invalid literal"),
        ("? [a]\n: 1\n? [a]\n: 2", r"not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused_soon(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"config\.yaml: .*{sentence}") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 30


def test_aliases_and_merges_stay(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: &base {x: 1}\nmore: {<<: *base, y: [*base, *base]}")
    assert read_yaml(tmp_path / "config.yaml")["more"] == {"x": 1, "y": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize("place", ["pipe.yaml", "/dev/zero"])
def test_a_config_without_an_end(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_yaml, "_READ_TIMEOUT", 0.2)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=rf"{place}: "):
        read_yaml(tmp_path / place)
