"""The runs that several tests look at: each is started once."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import Forked, ranks_of
from ports import free_port
from processes import PYTHON, ROOT, Ended, Started, children, ended, wait_for_end_of

# Enough steps for several attempts: 88 of 64 images.
_LONG = ("epochs=4", "checkpoint.every=20", "tracking.uri=null")
_HOLDING = Path(__file__).parents[1] / "support" / "holding.py"
_PATIENCE = 150  # seconds until two ranks are done, on a busy machine
_LOOKS = 0.01  # seconds between two looks at a file


class Hold:
    """The files by which two ranks wait until they are asked to leave, and before they end (holding.py).

    They wait at the end of step ``after``, before its row.
    """

    def __init__(self, folder: Path, *, after: int | None, stay: bool) -> None:
        self._hold, self._stay = folder / "hold", folder / "stay"
        if after is not None:
            self._hold.write_text(str(after))
        if stay:
            self._stay.touch()

    def wait_until_held(self) -> None:
        """Wait until both ranks wait at the end of the step."""
        self._wait_for_signs("held")

    def release(self) -> None:
        """Let those go on that were not asked to leave."""
        self._hold.unlink(missing_ok=True)

    def wait_until_done(self) -> None:
        """Wait until both ranks have nothing left to do but to end."""
        self._wait_for_signs("done")

    def _wait_for_signs(self, name: str) -> None:
        patience = time.monotonic() + _PATIENCE
        signs = [self._stay.with_name(f"{name}-{rank}") for rank in range(2)]
        while not all(each.exists() for each in signs):
            assert time.monotonic() < patience, f"the ranks are not {name}"
            time.sleep(_LOOKS)
        for each in signs:
            each.unlink()

    def let_end(self) -> None:
        """Let the ranks that are done end."""
        self._stay.unlink()


class Held(Started):
    """Two ranks under a launcher that wait at the end of a step."""

    def __init__(self, command: Sequence[str | Path], folder: Path, *, after: int) -> None:
        self.hold = Hold(folder, after=after, stay=False)
        super().__init__(command, folder, PYTHON_EXEC=str(_HOLDING))


class HeldRanks:
    """Two ranks without a launcher that wait at the end of a step, and before they end if they are to."""

    def __init__(
        self, settings: Sequence[str | Path], folder: Path, *, after: int | None = None, stay: bool = False
    ) -> None:
        self.hold = Hold(folder, after=after, stay=stay)
        self._port = free_port()
        places = ranks_of(2, self._port)
        self._ranks = [Forked(_HOLDING, ["-m", "pretrain.run", *settings], folder, **place) for place in places]

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank and to the processes that read for it."""
        self._ranks[rank].send_signal_to_all(number)

    def kill(self, rank: int) -> None:
        """Kill a rank."""
        self._ranks[rank].send_signal(signal.SIGKILL)

    def kill_worker(self, rank: int) -> int:
        """Kill one of the processes that read for a rank; return its process id."""
        parent = self._ranks[rank].process.pid
        assert parent is not None
        (server,) = children(parent)
        worker = children(server)[-1]
        os.kill(worker, signal.SIGKILL)
        return worker

    def ended(self) -> list[Ended]:
        """Wait for both, and for all that they started; how they ended, by rank."""
        found = [rank.ended() for rank in self._ranks]
        wait_for_end_of("MASTER_PORT", str(self._port))
        return found


@dataclass(frozen=True)
class LongRun:
    """A pretraining run in several attempts."""

    config: Path
    path: Path
    steps: int = 88
    more: tuple[str, ...] = ()  # settings

    @property
    def settings(self) -> Sequence[str | Path]:
        return [self.config, f"run.dir={self.path}", *_LONG, *self.more]

    @property
    def torchrun(self) -> Sequence[str | Path]:
        """Its command in two processes."""
        return ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "pretrain.run", *self.settings]

    def held(self, *, after: int) -> Held:
        """Start it under torchrun, to wait after a step."""
        return Held(self.torchrun, self.path.parent, after=after)

    def held_ranks(self, *, after: int | None = None, stay: bool = False) -> HeldRanks:
        """Start its ranks alone, to wait after a step and before their end."""
        return HeldRanks(self.settings, self.path.parent, after=after, stay=stay)


@pytest.fixture
def new_run(configs: dict[str, Path], tmp_path: Path) -> LongRun:
    """The long run, not yet started."""
    return LongRun(configs["pretrain"], tmp_path / "run")


@pytest.fixture(scope="session")
def long_run(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LongRun:
    """The long run under torchrun, never interrupted."""
    run = LongRun(configs["pretrain"], tmp_path_factory.mktemp("long") / "run")
    done = ended(run.torchrun, run.path.parent)
    assert done.code == 0, done.err
    return run


@dataclass(frozen=True)
class Pipeline:
    """The same command three times in one folder: a Ctrl-C in its first stage, then the rest, then nothing to do."""

    folder: Path
    interrupted: Ended
    begun: list[str]
    finished: Ended
    again: Ended
    before_again: dict[Path, int]
    after_again: dict[Path, int]

    @property
    def runs(self) -> Path:
        return self.folder / "runs" / "tiny"


_PIPELINE = """\
- name: pretrain
  stage: pretrain
  config: {pretrain}
  set: {{epochs: 4, run.processes: 2}}
- name: distill
  stage: distill
  config: {distill}
  from: {{teacher: pretrain}}
- name: finetune
  stage: finetune
  config: {finetune}
  set:
    init: null
    epochs: 2
    model: {{name: vit_tiny_patch16_224, patch: 4, width: 32, depth: 2, heads: 2}}
    data.lanes: 10
    data.samples_per_class: 2
    data.holdout_per_class: 4
    batch.global_size: 20
    trials.repeats: 2
    trials.lr_per_256: [1.0e-2, 4.0e-2]
    trials.arms.scratch: null
  from: {{trials.arms.pretrained: pretrain}}
"""


@pytest.fixture(scope="session")
def pipeline(configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "tiny.yaml").write_text(_PIPELINE.format(**configs))
    command = [PYTHON, ROOT / "slurm" / "submit.py", "tiny.yaml", "--cluster", "local"]
    first = Held(command, folder, after=5)
    first.hold.wait_until_held()
    first.process.send_signal(signal.SIGINT)
    interrupted = first.ended()
    first.hold.release()
    begun = sorted(run.parent.name for run in (folder / "runs" / "tiny").glob("*/science.json"))
    finished = ended(command, folder)
    before = _moments(folder)
    again = ended([*command, "pretrain.run.processes=1"], folder)  # enough to say so, and quicker
    return Pipeline(folder, interrupted, begun, finished, again, before, _moments(folder))


def _moments(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
