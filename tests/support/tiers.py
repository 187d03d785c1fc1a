"""The two tiers of the tests, how two processes share them so that both end together, and what each file takes.

``make test`` runs what is not marked thorough, ``make test-rest`` what is. tests/durations.json has the seconds of every
file that takes one, by tier; ``make test-durations`` writes it.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

DURATIONS = Path(__file__).parents[1] / "durations.json"
_SHORTEST = 1.0  # seconds: a file that takes less is not written down
_UNTIMED = 60.0  # seconds that a test which is marked slow is taken for where its file is not written down
_SLURM = ("tests/cluster/", "tests/chaos/")  # two clusters at once would be in each other's way
# They look at the same runs, which each process would make for itself (tests/doors/conftest.py: long_run, pipeline).
_SHARING = ("tests/doors/test_launchers.py", "tests/doors/test_pipeline.py", "tests/doors/test_preempted.py")


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def tier(keywords: Iterable[str]) -> str:
    """``rest`` of a test that is marked thorough, ``test`` of any other."""
    return "rest" if "thorough" in keywords else "test"


class ByFile(LoadScopeScheduling):
    """With ``-n``: the tests of a file stay together and share its fixtures; all that need a Slurm share a process.

    So do files that share long runs.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        if file.startswith(_SLURM):
            return "slurm"
        return "long runs" if file in _SHARING else file


def longest_first(items: list[pytest.Item], seconds: dict[str, dict[str, float]]) -> list[pytest.Item]:
    """What needs a Slurm waits most, and is first; then the files by their seconds, so that the last ones are short."""
    takes: dict[str, float] = defaultdict(float)
    for name, which in {(file_of(item.nodeid), tier(item.keywords)) for item in items}:
        takes[name] += seconds[which].get(name, 0.0)
    for item in items:
        if "slow" in item.keywords and file_of(item.nodeid) not in seconds[tier(item.keywords)]:
            takes[file_of(item.nodeid)] += _UNTIMED

    def place(item: pytest.Item) -> tuple[bool, float, str]:
        file = file_of(item.nodeid)
        return not file.startswith(_SLURM), -takes[file], file

    return sorted(items, key=place)


class Sharing:
    """With ``-n``: hands the tests out by file, the longest first."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> ByFile:
        config.option.loadscopereorder = False  # it would sort by the number of tests
        return ByFile(config, log)

    @pytest.hookimpl(trylast=True)  # when the other tier is deselected
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if hasattr(config, "workerinput"):
            items[:] = longest_first(items, json.loads(DURATIONS.read_text()))


class Recording:
    """``--write-durations``: what each file took, by tier; files that did not run keep what is written of them."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[str, float]] = {"test": defaultdict(float), "rest": defaultdict(float)}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[tier(report.keywords)][file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        root, before = DURATIONS.parents[1], json.loads(DURATIONS.read_text())
        for which, files in self._seconds.items():
            whole = {name: took for name, took in before[which].items() if (root / name).exists()} | files
            kept = {name: round(took, 1) for name, took in whole.items() if took >= _SHORTEST}
            before[which] = dict(sorted(kept.items(), key=lambda entry: -entry[1]))
        DURATIONS.write_text(json.dumps(before, indent=1) + "\n")
