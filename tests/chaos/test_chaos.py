"""Three faults befall a run, and it is bit for bit the run that was left alone; ``make chaos`` draws many more."""

from pathlib import Path

import pytest
from drive import Story, Trial, chaos, written
from harness import Cluster
from machines import Kind

from foveal.data.pack import pack_digits

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def story(third_node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("chaos")
    pack_digits(folder / "digits")
    lost = "cut" if third_node.kind is Kind.WIRED else "slurmd"
    return chaos(third_node, folder, Trial(["kill", lost, "torn"], steps=99, pace=0.2), lambda _: None)


def test_every_fault_was_seen_and_survived(story: Story) -> None:
    assert story.trouble == "", written(story, 0)
    assert [each.passed is not None for each in story.faults] == [True] * 3, written(story, 0)
    assert story.orphans == []


def test_the_disturbed_run_is_the_one_that_was_left_alone(story: Story) -> None:
    assert story.verdict is not None, story.trouble
    assert story.verdict.good, "\n".join(story.verdict.lines)


def test_the_report_has_a_line_for_every_fault(story: Story, tmp_path: Path) -> None:
    said = written(story, 0)
    assert all(each.name in said and each.target in said for each in story.faults)
    assert "DIFFERENT" not in said
