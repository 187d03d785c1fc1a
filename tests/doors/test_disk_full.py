"""A disk that is full for real: training goes on, the checkpoint before stays whole, and later ones are written again."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import PYTHON, ROOT, Ended, Started, column, ended, rows_of
from ranks import Ranks, stage_named

from foveal.data.records.audit import open_ledger

pytestmark = pytest.mark.timeout(600)
SCRIPT = ROOT / "tests" / "support" / "full_disk.py"


def on_a_disk_of(size: str, folder: Path, commands: Sequence[str]) -> Ended:
    """Run shell commands with a file system of so many bytes mounted on a folder; nobody else sees it."""
    shell = ["set -e", f"mount -t tmpfs -o size={size} tmpfs '{folder}'", *commands]
    return Started(["unshare", "--mount", "bash", "-c", "\n".join(shell)], ROOT).ended(450)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder that a small file system can be mounted on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs '{folder}'"
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not here to mount a small disk with")
    tried = subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({tried.stderr.strip()}): that needs root")
    return folder


def check(done: Ended, reason: str) -> None:
    """Steps 3 and 4 could not be saved, and nothing else was wrong."""
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["saved"] for row in rows] == [1, 2, None, None, 5, 6]
    assert [row["found"] for row in rows] == [1, 2, 2, 2, 5, 6]
    assert [row["left"] for row in rows] == [[f"step-{row['found']:08d}-attempt-0001"] for row in rows]
    assert len({row["loss"] for row in rows}) == 6
    warned = [line for line in done.err.splitlines() if line.startswith("NO CHECKPOINT")]
    assert len(warned) == 2
    for step, line in zip((3, 4), warned, strict=True):
        pattern = (
            rf"NO CHECKPOINT AT STEP {step}: rank 0: {reason} \(/.* has [\d.]+ [MG]B left, and 1\.6 MB were to be written\); "
            rf"training goes on, the newest is of step 2"
        )
        assert re.fullmatch(pattern, line), line


def test_a_full_disk(disk: Path) -> None:
    done = on_a_disk_of("6m", disk, [f"'{PYTHON}' '{SCRIPT}' '{disk}' filler"])
    check(done, "No space left on device")
    assert f"({disk} has 0.5 MB left" in done.err  # the disk that is full, and how full


def test_a_file_that_may_not_be_so_large(tmp_path: Path) -> None:
    """As a quota: the file system has room, and refuses all the same."""
    check(ended([PYTHON, SCRIPT, tmp_path, "limit"], ROOT), "File too large")


# --- a run, as a user starts it ---

STEPS = 22  # an epoch of the tiny config
ALONE = ("engine.kind=plain", "log.images_every=0")


def command(config: Path, run: Path, *settings: str) -> str:
    words = [PYTHON, "-m", "pretrain.run", config, f"run.dir={run}", "tracking.uri=null", *ALONE, *settings]
    return " ".join(f"'{word}'" for word in words)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_fills_its_disk_and_goes_on(
    disk: Path, configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """All checkpoints are kept until the disk is full; then its user makes room, and starts it again."""
    run, kept = disk / "run", tmp_path / "kept"
    first = command(configs["pretrain"], run, "checkpoint.every=2", "checkpoint.keep=99", "run.stop_at_step=20")
    make_room = f"ls -d '{run}'/checkpoints/step-* | head -n -1 | xargs rm -r"
    again = command(configs["pretrain"], run, "checkpoint.keep=1")
    done = on_a_disk_of("3m", disk, [first, f"ls '{run}/checkpoints'", make_room, again, f"cp -r '{run}' '{kept}'"])
    assert done.code == 0, done.err
    saved = [int(line[5:13]) for line in done.out.splitlines()]
    refused = [
        int(found) for found in re.findall(r"NO CHECKPOINT AT STEP (\d+): rank 0: No space left on device", done.err)
    ]
    assert saved[0] == 0
    assert refused[-1] == 20
    assert sorted(saved + refused) == list(range(0, 22, 2))
    assert f"resumed from {run}/checkpoints/step-{saved[-1]:08d}-attempt-0001" in done.err
    one_rank.train(stage_named("pretrain"), configs["pretrain"], tmp_path / "alone", *ALONE)
    assert column(rows_of(kept), "step") == list(range(1, STEPS + 1))
    assert column(rows_of(kept), "loss") == column(rows_of(tmp_path / "alone"), "loss")


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_of_two_ranks_loses_nothing_to_a_full_disk(disk: Path, configs: dict[str, Path], tmp_path: Path) -> None:
    """All that it writes beside its checkpoints lies on the disk too: rows, ledger, stragglers, pictures, last words."""
    run, kept = disk / "run", tmp_path / "kept"
    epochs = 15  # 330 steps, of which every fifth is in the table of stragglers
    settings = ["engine.kind=accelerate", "log.images_every=40", "data.ledger=true", "tracking.uri=null"]
    words = [configs["pretrain"], f"run.dir={run}", f"epochs={epochs}", *settings]
    ranks = " ".join(["torchrun --standalone --nproc-per-node=2 -m pretrain.run", *(f"'{word}'" for word in words)])
    rows = f"cat '{run}/metrics.jsonl' 2>/dev/null | wc -l"
    said = tmp_path / "said"
    commands = [
        f"{ranks} 2> '{said}' &",
        f"until [ $({rows}) -gt 30 ]; do sleep 0.02; done",
        f"cat /dev/zero > '{disk}/filler' 2>/dev/null || true",
        # What fits into the last page of a file that is there is still written.
        f"until grep -q 'metrics.jsonl: no room' '{said}'; do kill -0 $!; sleep 0.02; done; {rows}",
        f"rm '{disk}/filler'; wait $!; cp -r '{run}' '{kept}'",
    ]
    done = on_a_disk_of("8m", disk, commands)
    assert done.code == 0, done.err + said.read_text()
    last = epochs * STEPS
    assert 30 < int(done.out) < last, "rows that found no room wait"
    assert column(rows_of(kept), "step") == list(range(1, last + 1))
    record = open_ledger(kept)
    assert (record.after_step, record.last_step, len(record.read_rows(0, last))) == (0, last, last)
    table = [json.loads(line) for line in (kept / "stragglers.jsonl").read_text().splitlines()]
    assert sorted({(row["step"], row["rank"]) for row in table}) == [
        (step, rank) for step in range(5, last + 1, 5) for rank in (0, 1)
    ]


@pytest.mark.thorough
@pytest.mark.slow
def test_a_disk_too_small_for_one_checkpoint_is_one_sentence(disk: Path, configs: dict[str, Path]) -> None:
    done = on_a_disk_of("200k", disk, [command(configs["pretrain"], disk / "run")])
    assert done.code == 2, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith(f"foveal: {disk / 'run'} takes no checkpoint"), done.err
    assert f"NO CHECKPOINT AT STEP 0: rank 0: No space left on device ({disk} has " in done.err
    assert "Traceback" not in done.err
