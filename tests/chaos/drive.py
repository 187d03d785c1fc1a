"""``python tests/chaos/drive.py --report REPORT.md [--faults 5] [--seed 0] [--kinds kill,crash] [--steps 200]``

Disturbs a pretraining job on a real Slurm of three nodes with faults drawn from a seed, and compares the run with one
that was left alone. Exits with 1 when anything differs, hangs or is left behind.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cluster")]

from faults import Fault  # noqa: E402 - tests are files, not a package
from harness import Cluster, missing  # noqa: E402
from kinds import KINDS  # noqa: E402
from machines import succeeds  # noqa: E402
from scene import STEPS_PER_EPOCH, Scene, Stuck, checkout  # noqa: E402
from server import server  # noqa: E402
from verdict import COMPARED, Verdict, compare  # noqa: E402

_UNDISTURBED = 900  # seconds for a run without faults, and for the end of one with them
_STEPS_A_FAULT = 10  # what a run comes further by while a fault strikes, is seen and is got over
_GOING_ON = 300  # seconds within which a run must have passed the step that a fault found it at


@dataclass
class Struck:
    """A fault and what became of it. Seconds are counted from the strike."""

    name: str
    moment: str
    target: str = ""
    step: int = 0
    came: int = 0
    seen: float | None = None
    resumed: int | None = None
    passed: float | None = None

    @property
    def recomputed(self) -> int | None:
        return None if self.resumed is None else max(0, self.step - self.resumed)

    def lost(self, pace: float) -> float | None:
        """Seconds beyond those that the steps which it came further by take a run that is left alone."""
        return None if self.passed is None else max(0.0, self.passed - max(0, self.came - self.step) * pace)


@dataclass
class Story:
    """What happened to one disturbed run."""

    faults: list[Struck] = field(default_factory=list)
    seconds: float = 0.0
    undisturbed: float = 0.0
    pace: float = 0.0  # seconds of an undisturbed step
    replayed: int = 0  # batches that both runs which were compared have gone past
    orphans: list[str] = field(default_factory=list)
    trouble: str = ""
    verdict: Verdict | None = None

    @property
    def survived(self) -> int:
        return sum(each.passed is not None for each in self.faults)

    @property
    def good(self) -> bool:
        whole = self.verdict is not None and self.verdict.good
        return whole and not self.trouble and not self.orphans and self.survived == len(self.faults)


def disturb(scene: Scene, kinds: list[str], story: Story, tell: Callable[[], None]) -> None:
    """Strike one fault after another, each in its part of the run, and wait until the run has got over it."""
    part = (scene.steps - scene.every) // (len(kinds) + 1)
    for number, kind in enumerate(kinds):
        fault = KINDS[kind](scene)
        if reason := fault.impossible():
            raise Stuck(f"{fault.name}: {reason}")
        story.faults.append(_moment(scene, number, part, fault))
        try:
            _suffer(scene, fault, story.faults[-1])
        finally:
            if fault.target:  # else it has not struck
                with scene.held():
                    fault.mend()
            tell()


def _suffer(scene: Scene, fault: Fault, struck: Struck) -> None:
    began, (before, _) = time.monotonic(), scene.begun()

    def over() -> bool:
        attempt, start = scene.begun()
        step = scene.last_step()
        if not fault.resumes:
            return step > struck.step
        if attempt == before or start is None:  # the run may still get on before the fault ends it
            struck.step = max(struck.step, step)
            return False
        struck.resumed = start
        return step > struck.step

    fault.strike()
    struck.target, struck.step = fault.target, max(struck.step, scene.last_step())
    with scene.held() if fault.holds else nullcontext():
        scene.until(lambda: (over(), fault.seen())[1], f"the effect of '{fault.name}' is seen", fault.patience)
        if fault.holds:  # a rank that was cut off might finish the run before there is another
            scene.until(lambda: scene.begun()[0] != before, "there is another attempt", fault.patience)
    struck.seen = time.monotonic() - began
    time.sleep(fault.lasts)
    scene.until(over, f"step {struck.step} is passed", _GOING_ON)
    struck.passed, struck.came = time.monotonic() - began, scene.last_step()


def _moment(scene: Scene, number: int, part: int, fault: Fault) -> Struck:
    """Wait for the fault's moment: a step in its part of the run, or some seconds, which may fall into a start."""
    if number % 3 == 2:
        seconds = scene.dice.uniform(0.0, 8.0)
        time.sleep(seconds)
        return Struck(fault.name, f"{seconds:.1f} s after the last")
    step = scene.every + 1 + number * part + scene.dice.randrange(max(1, part))
    scene.until(lambda: scene.last_step() >= step or scene.over(), f"step {step} is reached", _GOING_ON)
    return Struck(fault.name, f"at step {step}")


def draw(dice: random.Random, faults: int, allowed: list[str]) -> list[str]:
    """Kinds in random order, each as often as the others within one."""
    drawn: list[str] = []
    while len(drawn) < faults:
        drawn += dice.sample(allowed, len(allowed))
    return drawn[:faults]


@dataclass(frozen=True)
class Trial:
    """How a run is disturbed. ``tasks``: ranks on each of two nodes; ``pace``: seconds that a step takes more."""

    kinds: list[str]
    seed: int = 0
    steps: int = 200
    every: int = 10
    pace: float = 0.25
    tasks: int = 1

    @property
    def exact(self) -> bool:
        """Whether the run keeps its ranks, so that its numbers are to be the same bit for bit."""
        return "resized" not in self.kinds

    def scene(self, cluster: Cluster, place: Path, name: str) -> Scene:
        steps = self.steps // STEPS_PER_EPOCH * STEPS_PER_EPOCH
        scene = Scene(cluster, place, name, steps, self.every, random.Random(self.seed), tasks=self.tasks)
        scene.partition = "low"
        scene.settings = ["engine.timeout_minutes=1", "data.stall_timeout_seconds=20"] if "stop" in self.kinds else []
        return scene


def chaos(
    cluster: Cluster, folder: Path, trial: Trial, tell: Callable[[Story], None], small_disk: Path | None = None
) -> Story:
    """The undisturbed run, then the disturbed one, then the comparison; ``folder`` has the packed digits.

    ``tell`` hears of the story after every fault. ``small_disk`` is for the checkpoints of the disturbed run.
    """
    place = checkout(folder / "checkout", folder / "digits", trial.pace)
    story = Story()
    alone, disturbed = (trial.scene(cluster, place, name) for name in ("alone", "disturbed"))
    disturbed.small_disk = small_disk
    if any(kind == "copy" or kind.startswith("server") for kind in trial.kinds):
        disturbed.server = server(cluster, folder / "server")
        disturbed.server.start(cluster)
    try:
        began = time.monotonic()
        alone.submit()
        alone.finish(_UNDISTURBED)
        story.undisturbed, story.pace = time.monotonic() - began, alone.pace()
        began = time.monotonic()
        disturbed.submit()
        disturb(disturbed, trial.kinds, story, lambda: tell(story))
        disturbed.finish(_UNDISTURBED)
        story.seconds = time.monotonic() - began
        delivered = disturbed.server.delivered(disturbed.run, COMPARED) if disturbed.server else None
        reference = alone
        if gone_back := disturbed.rollbacks():  # then the run to equal is one that never had those batches
            reference = trial.scene(cluster, place, "replayed")
            reference.spare(gone_back)
            reference.submit()
            reference.finish(_UNDISTURBED)
            story.replayed = sum(len(each["batches"]) for each in gone_back)
        story.verdict = compare(reference.run, disturbed.run, exact=trial.exact, delivered=delivered)
    except Stuck as stuck:
        story.trouble = str(stuck)
        cluster.run("scancel", alone.job, disturbed.job, check=False)
    left_behind(cluster, story)
    return story


def left_behind(cluster: Cluster, story: Story) -> None:
    """What of ours runs although no job does; Slurm has a moment to end what it knows of."""
    end = time.monotonic() + 30
    while (found := cluster.orphans()) and time.monotonic() < end:
        time.sleep(0.5)
    story.orphans = [f"pid {each.pid}: {each.command}" for each in found]


@contextmanager
def small_disk(folder: Path, wanted: bool, megabytes: int = 64) -> Iterator[Path | None]:
    """A disk of its own that is soon full, where this process may mount one. The nodes see what is mounted before them."""
    folder.mkdir()
    if not wanted or not succeeds(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], os.environ
    ):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def written(story: Story, seed: int) -> str:
    """The story in Markdown."""
    times = f"Undisturbed {story.undisturbed:.0f} s, disturbed {story.seconds:.0f} s"
    counts = (
        f"faults survived: {story.survived}, hung jobs: {int(bool(story.trouble))}, processes left behind: {len(story.orphans)}, "
        f"steps taken again: {sum(each.recomputed or 0 for each in story.faults)}"
    )
    ended = story.verdict is not None or story.trouble
    outcome = "passed" if story.good else "FAILED" if ended else "still going"
    lines = [
        f"# Chaos: {len(story.faults)} faults, seed {seed}: {outcome}",
        "",
        f"{times}, {counts}.",
        "",
        "| fault | moment | target | step | seen after s | resumed from | taken again | passed after s | lost s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for each in story.faults:
        seconds = _number(each.passed), _number(each.lost(story.pace))
        numbers = (_number(each.seen), each.resumed, each.recomputed, *seconds)
        cells = [each.name, each.moment, each.target, each.step, *("" if one is None else one for one in numbers)]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    if story.replayed:
        lines += [
            "",
            f"Compared with a run that was told from the start to go past the {story.replayed} batches that gave NaN.",
        ]
    lines += [
        "",
        *(story.verdict.lines if story.verdict else []),
        *(f"- left behind: {each}" for each in story.orphans),
    ]
    lines += [f"\n```\n{story.trouble}\n```"] if story.trouble else []
    return "\n".join(lines) + "\n"


def _number(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="drive.py", description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="where the Markdown goes")
    parser.add_argument("--faults", type=int, help="how many (default: one of each kind)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"of the run (default: {_STEPS_A_FAULT} for each fault)")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--pace", type=float, default=0.25, help="seconds that a step takes more")
    parser.add_argument("--tasks", type=int, default=1, help="ranks on each of the two nodes")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)")
    options = parser.parse_args()
    if absent := missing():
        parser.error(f"no Slurm here ({', '.join(absent)} missing): run tests/cluster/install_slurm.sh as root")
    allowed = options.kinds.split(",")
    if unknown := set(allowed) - set(KINDS):
        parser.error(f"there is no kind {min(unknown)}; there are {', '.join(KINDS)}")

    def tell(story: Story) -> None:
        options.report.write_text(written(story, options.seed))

    from foveal.data.pack import pack_digits

    options.report.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    pack_digits(folder / "digits")
    kinds = draw(random.Random(options.seed), options.faults or len(allowed), allowed)
    steps = options.steps or _STEPS_A_FAULT * len(kinds)
    trial = Trial(kinds, options.seed, steps, options.every, options.pace, options.tasks)
    place = Path(tempfile.mkdtemp(prefix="fov-", dir="/tmp"))  # TMPDIR may be too long for UNIX sockets
    with small_disk(folder / "disk", "full" in kinds) as disk, Cluster(place, nodes=3) as cluster:
        story = chaos(cluster, folder, trial, tell, disk)
    tell(story)
    sys.stdout.write(f"{options.report}: {'passed' if story.good else 'FAILED'}; the runs are in {folder}\n")
    sys.exit(0 if story.good else 1)


if __name__ == "__main__":
    main()
