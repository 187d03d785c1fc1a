"""docs/proofs.md: every promise has a test in every change, and each test that is named exists and runs where it says."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
from house import ROOT
from tiers import file_of, tier

_PAGE = ROOT / "docs" / "proofs.md"
_HEAD = "| promise | make test | make test-rest |"
Tests = dict[str, tuple[str, ...]]  # by tier: files, and tests as file::test


@dataclass(frozen=True)
class Proof:
    """A row of the page."""

    promise: str
    tests: Tests


def proofs(text: str) -> Iterator[Proof]:
    """The rows of all tables. A cell names tests, separated by commas, from the folder tests on."""
    for line in text.splitlines():
        if line.startswith("| ") and line != _HEAD:
            promise, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            named = [tuple(f"tests/{name}" for name in re.findall(r"[\w/]+\.py(?:::\w+)?", cell)) for cell in cells]
            yield Proof(promise, dict(zip(("test", "rest"), named, strict=True)))


class _Collected:
    """A plugin that notes the tiers of every test, and of its file."""

    def __init__(self) -> None:
        self.tiers: dict[str, set[str]] = defaultdict(set)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        for name in (item.nodeid.partition("[")[0], file_of(item.nodeid)):
            self.tiers[name].add(tier(item.keywords))


@cache
def collected() -> dict[str, set[str]]:
    """Which tiers the named files and their tests run in, as pytest collects them."""
    named = {file_of(name) for proof in proofs(_PAGE.read_text()) for tests in proof.tests.values() for name in tests}
    there = [str(ROOT / name) for name in sorted(named) if (ROOT / name).is_file()]
    seen = _Collected()
    options = ["--collect-only", "-qq", "-s", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    assert pytest.main([*options, *there], plugins=[seen]) == pytest.ExitCode.OK
    return seen.tiers


PROOFS = list(proofs(_PAGE.read_text()))


def test_the_page_has_its_tables() -> None:
    text = _PAGE.read_text()
    assert text.count(_HEAD) == text.count("\n## ")
    assert len(PROOFS) > 30


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.promise[:60])
def test_a_promise_is_held(proof: Proof) -> None:
    assert proof.tests["test"], "make test proves nothing of it"
    wrong = {
        name: sorted(collected().get(name, set()))
        for which, names in proof.tests.items()
        for name in names
        if which not in collected().get(name, set())
    }
    assert not wrong, "these run in other tiers, or nowhere"


@pytest.mark.parametrize("name", ["tests/numerics/test_none.py", "tests/numerics/test_golden.py::test_none"])
def test_a_test_that_is_not_there_is_seen(name: str) -> None:
    assert not collected().get(name)
