"""CIFAR-10 on 1, 2 and 4 ranks, each run killed three times at random moments: the ledgers say the same, slot by slot.

What is compared is what the loop consumed, read from the files that every rank wrote, by the command a user types.
"""

import gzip
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from forked import Forked, all_alive, ranks_of
from ports import free_port
from processes import PYTHON, ended, wait_for_row

from foveal.data.records.audit import audit_epochs, open_ledger
from foveal.tracking.jsonl import read_rows_without_time

pytestmark = [pytest.mark.thorough, pytest.mark.slow, pytest.mark.timeout(900)]

_SHARDS, _SAMPLES = 1, 5_000  # of CIFAR-10's ten shards for training: images are most of the work, and prove no more
_STEPS, _BATCH = 60, 128  # an epoch has 39 steps: the last kill finds some runs in the second
_KILLS = ((7, 20), (23, 32), (35, 45))  # steps between which a run is killed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = os.environ.get("FOVEAL_TEST_DATA")
    if not place:
        pytest.skip("FOVEAL_TEST_DATA is not set: there is no CIFAR-10 here")
    folder = tmp_path_factory.mktemp("cifar10")
    for packed in sorted(Path(place, "cifar10").glob("train*.tar.gz"))[:_SHARDS]:
        with gzip.open(packed) as source, (folder / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    assert ended([PYTHON.parent / "foveal", "data", "index", folder], folder).code == 0
    tree = {
        "epochs": 2,
        "data": {"path": str(folder), "image_size": 32, "ledger": True, "mean": [0.5] * 3, "std": [0.25] * 3},
        "batch": {"global_size": _BATCH, "max_micro_size": _BATCH},
        "engine": {"kind": "accelerate"},  # that of the shortest start
        "model": {"name": "vit_tiny_patch16_224", "patch": 8, "width": 32, "depth": 1, "heads": 2},
        "decoder": {"width": 16, "depth": 1, "heads": 2},
        "optim": {"lr_per_256": 1.0e-3, "warmup_epochs": 0.1},
        "log": {"every": 1},
        "checkpoint": {"every": 5},
        "run": {"stop_at_step": _STEPS},
        "tracking": {"uri": None},
    }
    file = folder / "cifar10.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def killed_thrice(config: Path, run: Path, ranks: int, at_once: int, workers: int) -> Path:
    """Train on so many ranks, and SIGKILL all of them three times on the way."""
    settings = [config, f"run.dir={run}", f"batch.max_micro_size={at_once}", f"data.workers={workers}"]
    settings += [f"data.prefetch_batches={workers + 1}"]
    moment = random.Random(ranks)

    def start() -> list[Forked]:
        port = free_port()
        places = ranks_of(ranks, port) if ranks > 1 else [{}]
        return [Forked("pretrain.run", settings, run.parent, **place) for place in places]

    for earliest, latest in _KILLS:
        plan = run / "plan.json"
        before = plan.stat().st_mtime_ns if plan.exists() else 0
        started = start()
        # Until then the rows are those of the attempt before, which may have gone further than this one shall.
        while not plan.exists() or plan.stat().st_mtime_ns == before:
            if not all_alive(started):
                pytest.fail(f"{run} did not begin: {[rank.ended() for rank in started]}")
            time.sleep(0.01)
        if not wait_for_row(run, moment.randint(earliest, latest), partial(all_alive, started)):
            pytest.fail(f"{run} was not killed in time: {[rank.ended() for rank in started]}")
        time.sleep(moment.uniform(0, 0.2))
        for each in started:
            each.process.kill()
        for each in started:
            assert each.ended().code == -signal.SIGKILL
        assert read_rows_without_time(run / "metrics.jsonl")[-1]["step"] < _STEPS
    for last in [each.ended() for each in start()]:
        assert last.code == 0, last.err
    return run


@pytest.fixture(scope="module")
def runs(config: Path) -> list[Path]:
    shapes = ((1, 128, 1), (2, 32, 0), (4, 8, 0))
    return [killed_thrice(config, config.parent / f"ranks-{shape[0]}", *shape) for shape in shapes]


def test_ledgers_are_identical(runs: list[Path]) -> None:
    for other in runs[1:]:
        audited = ended([PYTHON.parent / "foveal", "data", "audit", runs[0], "--against", other], runs[0].parent)
        assert audited.code == 0, audited.out + audited.err
        assert f"identical to {other}, slot by slot, in the steps 1 to {_STEPS} that both have" in audited.out


def test_every_run_was_four_attempts_and_saw_no_sample_twice(runs: list[Path]) -> None:
    for run in runs:
        record = open_ledger(run)
        assert len(list((run / "ledger").glob("attempt-*.json"))) == 4
        first, second = audit_epochs(record)
        steps, dropped = divmod(_SAMPLES, _BATCH)
        again = (_STEPS - steps) * _BATCH
        assert first.samples_by_times_seen == (dropped, _SAMPLES - dropped, 0, 0)
        assert second.samples_by_times_seen == (_SAMPLES - again, again, 0, 0)


def test_a_run_with_another_seed_is_not_identical(runs: list[Path], config: Path) -> None:
    other = config.parent / "other"
    settings = [config, f"run.dir={other}", "seed=1", "run.stop_at_step=2"]
    assert Forked("pretrain.run", settings, config.parent).ended().code == 0
    audited = ended([PYTHON.parent / "foveal", "data", "audit", runs[0], "--against", other], config.parent)
    assert audited.code == 1
    assert "step 1 is the first that consumed other samples" in audited.out
