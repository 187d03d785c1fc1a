"""A cut node's rank goes on while Slurm starts the job on another node: the old attempt stops by itself, in time."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Cluster
from machines import Kind
from processes import PYTHON, Ended, column, ended
from scene import SETTINGS, STEPS_PER_EPOCH, Scene, checkout
from verdict import compare

from foveal.errors import AttemptSupersededError
from foveal.training.lease import AttemptRecord

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(900)]
_EPOCHS = 2
_STEPS = _EPOCHS * STEPS_PER_EPOCH
_PACE = 0.1  # seconds more for each of a step's four micros: an attempt that looks every 5 s must not be done by then


@dataclass(frozen=True)
class Fenced:
    """The run, and what was seen of its first attempt while its node was cut off."""

    scene: Scene
    alone: Ended
    attempts: list[AttemptRecord]  # when the first had ended
    before: set[str]  # what the first had published when the second took its number
    after: set[str]  # and when it had ended


@pytest.fixture(scope="module")
def fenced(third_node: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fenced]:
    """One rank on one node, so that nothing of its own world breaks: only a later attempt can make it stop."""
    if third_node.kind is not Kind.WIRED:
        pytest.skip("no network namespaces here: a node cannot be cut off")
    place = checkout(tmp_path_factory.mktemp("fencing") / "checkout", digits, _PACE)
    scene = Scene(third_node, place, "cut", _STEPS, every=1, dice=random.Random(0), nodes=1, tasks=1)
    node = ""
    try:
        third_node.all_idle()
        scene.submit()
        scene.until(lambda: scene.last_step() >= 2, "the first attempt makes steps", 240)
        node = scene.world()[0].node
        third_node.machines.cut(node)
        step = scene.last_step()
        scene.until(lambda: scene.last_step() >= step + 2, "the first attempt goes on without a network", 60)
        with scene.held():  # Slurm takes its time, and the run must not be over by then
            line = ["digits", *SETTINGS, "run.dir=runs/alone", f"epochs={_EPOCHS}", "tracking.uri=null"]
            alone = ended([PYTHON, "-m", "pretrain.run", *line], place)
            scene.until(lambda: scene.begun()[0] == 2, "there is a second attempt", 240)
            before = published(scene)
        scene.until(lambda: scene.attempts()[0].exit_code is not None, "the first attempt has ended", 120)
        scene.until(lambda: 0 not in starts_alive(scene), "the first attempt's rank is gone", 60)
        told, after = scene.attempts(), published(scene)
        scene.finish(240)
        yield Fenced(scene, alone, told, before, after)
    finally:
        if scene.job:
            third_node.run("scancel", scene.job, check=False)
        if node:  # with a new slurmd: Slurm would look after the old one in a minute only
            third_node.machines.crash(node)
            third_node.machines.start(node)
            third_node.all_idle()


def published(scene: Scene) -> set[str]:
    """The checkpoints of the first attempt."""
    return {each.name for each in scene.checkpoints() if each.name.endswith("-attempt-0001")}


def starts_alive(scene: Scene) -> set[int]:
    """By how often the job had been requeued: the starts of it that have living ranks."""
    return {rank.restarts for rank in scene.cluster.ranks(scene.job)}


def test_the_old_attempt_stops_while_its_node_is_still_cut_off(fenced: Fenced) -> None:
    old, new = fenced.attempts
    assert old.exit_code == AttemptSupersededError.exit_code
    assert old.reason is not None and "another attempt has taken over" in old.reason
    assert new.exit_code is None, "it goes on"
    assert old.holder is not None and new.holder is not None
    assert old.holder.job == new.holder.job
    assert old.holder.nodes != new.holder.nodes


def test_it_publishes_nothing_once_there_is_another(fenced: Fenced) -> None:
    assert fenced.before
    assert fenced.after <= fenced.before


def test_the_run_is_the_one_that_was_left_alone(fenced: Fenced) -> None:
    assert fenced.alone.code == 0, fenced.alone.err
    assert column(fenced.scene.rows(), "step") == list(range(1, _STEPS + 1))
    verdict = compare(fenced.scene.folder / "runs/alone", fenced.scene.run, exact=True)
    assert verdict.good, "\n".join(verdict.lines)
    assert [each.exit_code for each in fenced.scene.attempts()] == [AttemptSupersededError.exit_code, 0]
