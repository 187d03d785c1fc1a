"""Lanes that no setting states: the number is science, the same on every number of ranks, and a run continues by it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import Ranks, stage_named

from foveal.atomic import read_json
from foveal.errors import CheckpointError
from foveal.training.fork import plan_fork

STAGE = stage_named("pretrain")


@pytest.fixture
def without_lanes(configs: dict[str, Path], tmp_path: Path) -> Path:
    """The config of pretraining with a batch of 60 images and no lanes."""
    tree = yaml.safe_load(configs["pretrain"].read_text())
    del tree["data"]["lanes"]
    tree["batch"]["global_size"] = 60
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def plan(file: Path, *overrides: str, ranks: int = 1) -> Any:
    cfg = STAGE.config_class.load(file, ["run.dir=runs/none", "engine.kind=deepspeed", *overrides])
    return STAGE.functions.build_plan(cfg, ranks)


def test_the_number_is_science_and_no_matter_of_ranks(without_lanes: Path) -> None:
    plans = [plan(without_lanes, ranks=ranks) for ranks in (1, 2, 4, 30)]
    assert [found.science_settings()["data.lanes"] for found in plans] == [30] * 4
    assert all(found.science_settings() == plans[0].science_settings() for found in plans)
    assert any("30 lanes (32 do not fit" in line for line in plans[0].summary_lines())


def test_a_run_of_an_earlier_version_has_the_32_that_are_derived(without_lanes: Path, tmp_path: Path) -> None:
    found = plan(without_lanes, "batch.global_size=64")
    earlier = found.science_settings() | {"data.lanes": 32}
    found.check_continues(earlier, tmp_path)
    with pytest.raises(CheckpointError, match=r"data.lanes \(was 16, is 32\)"):
        found.check_continues(earlier | {"data.lanes": 16}, tmp_path)


def test_a_run_continues_and_forks_by_the_number(without_lanes: Path, one_rank: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one_rank.train(STAGE, without_lanes, run, "engine.kind=plain", "run.stop_at_step=1")
    assert read_json(run / "science.json")["data.lanes"] == 30
    (checkpoint,) = (run / "checkpoints").glob("step-00000001-*")
    assert '"data.lanes": 30' in (checkpoint / "state.json").read_text()
    one_rank.train(STAGE, without_lanes, run, "engine.kind=plain", "run.stop_at_step=2", "data.lanes=30")
    with pytest.raises(CheckpointError, match=r"data.lanes \(was 30, is 20\)"):
        one_rank.train(STAGE, without_lanes, run, "engine.kind=plain", "data.lanes=20")
    for lanes, has_same_order in (("null", True), ("30", True), ("20", False)):
        fork = plan(without_lanes, f"run.fork={run}", f"data.lanes={lanes}", "optim.lr_per_256=1.0e-3")
        assert plan_fork(fork, tmp_path / "fork").fork.has_same_order == has_same_order


def test_lanes_of_the_file_give_way_to_a_batch_of_the_command_line(configs: dict[str, Path]) -> None:
    def lanes(*overrides: str) -> int | None:
        return STAGE.config_class.load(configs["pretrain"], overrides).data.lanes

    assert lanes("batch.global_size=32") == 8
    assert lanes("batch.global_size=20") is None
    assert lanes("batch={global_size: 20}") is None
    assert lanes("batch.global_size=20", "data.lanes=8") == 8
