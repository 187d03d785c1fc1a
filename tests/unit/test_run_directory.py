"""Where a run lives: its own directory, a fresh sibling, or the sibling that this job made before it was requeued."""

from pathlib import Path

import pytest
import yaml
from ranks import Ranks, stage_named

from foveal.door import load


def folders(run: Path) -> list[str]:
    return sorted(each.name for each in run.parent.iterdir())


def test_fresh_is_a_numbered_sibling_that_knows_its_place(configs, one_rank: Ranks, tmp_path: Path) -> None:
    stage, run = stage_named("pretrain"), tmp_path / "run"
    for _ in range(3):
        one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at=2", "run.fresh=true")
    assert folders(run) == ["run", "run-2", "run-3"]
    again = load(stage.config, "pretrain", str(tmp_path / "run-3" / "config.yaml"), [])
    assert (again.run.dir, again.run.fresh) == (str(tmp_path / "run-3"), False)


def test_a_requeued_job_goes_on_in_the_sibling_it_made(
    configs, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm starts it with the same command line; another start in the same job is fresh again."""
    from foveal import opening

    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at=2")
    cfg = load(stage.config, "pretrain", str(configs["pretrain"]), [f"run.dir={run}", "run.fresh=true"])
    made = tmp_path / "run-2"
    made.mkdir()
    (made / "job.json").write_text('{"slurm_job_id": "77"}')
    for variables, expected in (
        ({"slurm_job_id": "77"}, "run-3"),
        ({"slurm_job_id": "77", "slurm_restart_count": "1"}, "run-2"),
        ({"slurm_job_id": "78", "slurm_restart_count": "1"}, "run-3"),
        ({}, "run-3"),
    ):
        monkeypatch.setattr(opening, "slurm_job", lambda variables=variables: variables)
        assert opening._directory(cfg).name == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["dir"] == str(run)
