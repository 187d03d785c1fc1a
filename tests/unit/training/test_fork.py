"""What a fork begins from: its setting, a source that is alive, and the settings that decide the order of samples."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import Ranks, stage_named

from foveal.atomic import read_json, sha256
from foveal.config import set_by_dotted_key
from foveal.errors import CheckpointError
from foveal.training import fork as forks
from foveal.training import fork_source
from foveal.training.fork import begin_fork, plan_fork, release_checkpoint
from foveal.training.fork_source import parse_fork
from foveal.training.lineage import ORDER_SETTINGS, Fork, read_fork, write_fork

STAGE = stage_named("pretrain")


@pytest.fixture(scope="module")
def source(configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 3, with the checkpoints 0, 2 and 3. Tests only read it."""
    run = tmp_path_factory.mktemp("source") / "run"
    settings = ("engine.kind=plain", "checkpoint.keep=9", "run.stop_at_step=3", "checkpoint.every=2")
    one_rank.train(STAGE, configs["pretrain"], run, *settings)
    return run


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """The source, which a test may change."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.fixture
def plan_of(configs: dict[str, Path], tmp_path: Path) -> Callable[[str], Any]:
    """The plan of a fork in ``run``, by its setting."""

    def plan(setting: str) -> Any:
        cfg = STAGE.config_class.load(configs["pretrain"], [f"run.dir={tmp_path / 'run'}", f"run.fork={setting}"])
        return STAGE.functions.build_plan(cfg, 1)

    (tmp_path / "run").mkdir()
    return plan


def test_a_setting_is_a_run_and_perhaps_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b@7").mkdir()
    assert parse_fork("runs/a") == (tmp_path / "runs/a", None)
    assert parse_fork("runs/a@120") == (tmp_path / "runs/a", 120)
    assert parse_fork("runs/a@home") == (tmp_path / "runs/a@home", None)
    assert parse_fork("b@7") == (tmp_path / "b@7", None)
    assert parse_fork("b@7@3") == (tmp_path / "b@7", 3)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    fork = Fork("a@3", "/a", 3, "d", 3, 3, [0.5], [0.2], {"epochs": [1, 2]}, "abc", Path("/a/checkpoints/x"))
    assert read_fork(tmp_path) is None
    write_fork(tmp_path, fork)
    read = read_fork(tmp_path)
    assert read is not None
    assert read.checkpoint is None
    assert (read.run, read.differences, read.tags()["fork.step"]) == ("/a", {"epochs": [1, 2]}, "3")
    (tmp_path / "fork.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not as foveal wrote it"):
        read_fork(tmp_path)


def test_names_match_a_setting_or_its_section() -> None:
    changes = {"data.mix.0.fraction": [None, 0.5], "data.windows": [1, 2], "seed": [0, 1]}
    fork = Fork("a", "/a", 3, "d", 3, 3, None, None, changes)
    assert fork.differs_in(["data.mix", "data.window"]) == ["data.mix.0.fraction"]
    assert not fork.has_same_order


CHANGED = {
    "seed": 4,
    "batch.global_size": 32,
    "data.lanes": 4,
    "data.window": 1,
    "data.samples_per_class": 50,
    "data.balance": 1.0,
    "data.holdout_per_class": 5,
    "data.fold": {"of": 3, "number": 0},
    "data.train": "val",
}
# Science of the data that changes pixels or evaluations; another setting of the data must be put on one of the lists.
SAME_ORDER = {
    *("val", "image_size", "channels", "eval_size", "labels", "label_field", "ignore_id", "augment", "eval_crop_ratio"),
    *("mean", "std", "jpeg_scaling", "decode_version", "weights_version"),
}


def test_the_settings_of_the_order_are_the_ones_that_change_it(configs: dict[str, Path]) -> None:
    cfg = STAGE.config_class.load(configs["pretrain"], ["run.dir=none", "data.window=2"])

    def order_of(cfg: Any) -> np.ndarray:
        training = STAGE.functions.build_plan(cfg, 1).training_set
        return np.concatenate([training.sample_keys(training.order.assign_slots(at, 0, 32)) for at in range(12)])

    for name, value in CHANGED.items():
        tree = cfg.model_dump()
        set_by_dotted_key(tree, name, value)
        assert name in ORDER_SETTINGS
        if name != "data.window":  # the digits are one shard
            assert not np.array_equal(order_of(type(cfg).from_dict(tree, name)), order_of(cfg)), name
    decided = {name.removeprefix("data.") for name in ORDER_SETTINGS if name.startswith("data.")} | SAME_ORDER
    science = {name.split(".")[1] for name in cfg.science_settings() if name.startswith("data.")}
    assert science <= decided


def test_a_step_that_a_later_attempt_made_void(plan_of: Callable[[str], Any], copy: Path) -> None:
    (copy / "attempts" / "0002.start.json").write_text(json.dumps({"step": 2, "starts": {"2": 2}}))
    assert plan_fork(plan_of(f"{copy}"), copy.parent / "run").fork.step == 2
    with pytest.raises(CheckpointError, match=r"step 3 there is only one that a later attempt has made void; .* 0, 2$"):
        plan_fork(plan_of(f"{copy}@3"), copy.parent / "run")


def test_what_a_fork_links_outlives_its_source(plan_of: Callable[[str], Any], copy: Path, source: Path) -> None:
    run = copy.parent / "run"
    held = begin_fork(plan_of(str(copy)), run).fork.checkpoint
    shutil.rmtree(copy)
    original = next((source / "checkpoints").glob("step-00000003-*"))
    assert {file.name: sha256(file) for file in held.iterdir()} == {f.name: sha256(f) for f in original.iterdir()}
    assert begin_fork(plan_of(str(copy)), run).fork.digest == sha256(original / "checksums.json")
    release_checkpoint(run)
    assert not held.exists()


def test_without_links_the_source_is_read_in_its_place(
    plan_of: Callable[[str], Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_device)
    fork = begin_fork(plan_of(str(copy)), copy.parent / "run").fork
    assert fork.checkpoint.parent == copy / "checkpoints"
    shutil.rmtree(fork.checkpoint)
    assert "removed its checkpoint of step 3 meanwhile; start again" in forks._explain_unreadable(fork)


class RunInProgress:
    """A run in progress, as far as its folder shows: a checkpoint after another, and none but the newest is kept.

    It trains on while a fork looks at it, and at most as many steps as it is allowed.
    """

    def __init__(self, run: Path) -> None:
        self._root, self._step = run / "checkpoints", 3
        self._newest = next(self._root.glob("step-00000003-*"))

    @contextmanager
    def training(self, num_steps: int) -> Iterator[None]:
        """Train steps beside the body, and end when both have ended."""
        thread = threading.Thread(target=lambda: [self._train_step() for _ in range(num_steps)])
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _train_step(self) -> None:
        self._step += 1
        draft = Path(shutil.copytree(self._newest, self._root / ".draft"))
        (draft / "state.json").write_text(json.dumps(read_json(self._newest / "state.json") | {"step": self._step}))
        name = f"step-{self._step:08d}-attempt-0001"
        draft.rename(self._root / name)
        self._newest.rename(self._root / ".gone-x")
        shutil.rmtree(self._root / ".gone-x")
        self._newest = self._root / name


def test_a_run_in_progress_may_remove_what_is_read(plan_of: Callable[[str], Any], copy: Path) -> None:
    """Each fork holds a complete checkpoint, whenever its source removes one: fewer removals than tries fail none."""
    run, plan, found = copy.parent / "run", plan_of(str(copy)), set()
    for old in ("00000000", "00000002"):
        shutil.rmtree(next((copy / "checkpoints").glob(f"step-{old}-*")))
    source = RunInProgress(copy)
    for num_steps in (1, 2, 3, 4, 4, 3):  # the fork's schedule has 22 steps
        with source.training(num_steps):
            for _ in range(3):
                fork = begin_fork(plan, run).fork
                assert len(list(fork.checkpoint.iterdir())) == 4
                assert read_json(fork.checkpoint / "state.json")["step"] == fork.step
                found.add(fork.step)
                release_checkpoint(run)
    assert len(found) > 2  # at least one of two rounds moved on while nobody looked


@pytest.mark.parametrize("moment", ["read", "linked"])
def test_a_checkpoint_that_is_gone_when_it_is_used(
    moment: str, plan_of: Callable[[str], Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest that is left takes its place; a named step ends with a sentence."""
    run, hold, choose = copy.parent / "run", forks._hold_checkpoint, fork_source._choose_checkpoint

    def remove_newest(checkpoint: Path) -> Path:
        if checkpoint.name.startswith("step-00000003"):
            shutil.rmtree(checkpoint)
        return checkpoint

    if moment == "read":
        monkeypatch.setattr(fork_source, "_choose_checkpoint", lambda *named: remove_newest(choose(*named)))
    else:
        monkeypatch.setattr(forks, "_hold_checkpoint", lambda folder, into: hold(remove_newest(folder), into))
    again = Path(shutil.copytree(copy, copy.parent / "again"))
    assert begin_fork(plan_of(str(copy)), run).fork.step == 2
    with pytest.raises(CheckpointError, match="of step 3 there is none; there are the steps 0, 2"):
        begin_fork(plan_of(f"{again}@3"), run)


def test_pixels_are_normalised_as_for_the_weights(plan_of: Callable[[str], Any], copy: Path) -> None:
    """Of two data sets the source's has the say; a setting and the card of an export come before it."""
    plan = plan_of(str(copy))
    fork = replace(plan_fork(plan, copy.parent / "run").fork, mean=[0.25], std=[0.125])
    forked = plan.with_fork(fork)
    assert (forked.mean, forked.std, forked.science_settings()["inherited.mean"]) == ((0.25,), (0.125,), [0.25])
    data = plan.cfg.data.model_copy(update={"mean": (0.5,), "std": (0.5,)})
    stated = replace(plan, cfg=plan.cfg.model_copy(update={"data": data}), mean=(0.5,), std=(0.5,))
    for other in (stated, replace(plan, has_source_card=True)):
        assert (other.with_fork(fork).mean, other.with_fork(fork).std) == (other.mean, other.std)
