"""One list of what the server of forks has imported: a second one would take its place, and every fork would import anew."""

import re

from house import ROOT


def test_only_one_module_of_the_tests_sets_the_list() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    setting = [file for file in files if re.search(r"\.set_forkserver_preload\(", file.read_text())]
    assert [file.relative_to(ROOT).as_posix() for file in setting] == ["tests/support/forked.py"]
