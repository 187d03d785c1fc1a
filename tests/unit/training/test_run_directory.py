"""The run directory: its own, a fresh sibling, or the sibling that this job created before its requeue."""

import errno
import json
from pathlib import Path

import pytest
import torch
import yaml
from ranks import Ranks, stage_named

from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import ConfigError, RestartLoopError
from foveal.slurm import SlurmJob
from foveal.training.cli import load_config
from foveal.training.lease import acquire_lease
from foveal.training.lease_holder import current_holder
from foveal.training.run_directory import keep_rules_of_run


def folders(run: Path) -> list[str]:
    return sorted(file.name for file in run.parent.iterdir())


def test_fresh_is_a_numbered_sibling_that_knows_its_place(configs, one_rank: Ranks, tmp_path: Path) -> None:
    stage, run = stage_named("pretrain"), tmp_path / "run"
    for _ in range(3):
        one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=2", "run.fresh=true")
    assert folders(run) == ["run", "run-2", "run-3"]
    again = load_config(stage.config_class, "pretrain", str(tmp_path / "run-3" / "config.yaml"), [])
    assert (again.run.dir, again.run.fresh) == (str(tmp_path / "run-3"), False)


def test_a_requeued_job_goes_on_in_the_sibling_it_made(
    configs, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm requeues a job with the same command line; a second start within one job is fresh again."""
    from foveal.training import run_directory

    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=2")
    cfg = load_config(stage.config_class, "pretrain", str(configs["pretrain"]), [f"run.dir={run}", "run.fresh=true"])
    sibling = tmp_path / "run-2"
    sibling.mkdir()
    (sibling / "job.json").write_text('{"slurm_job_id": "77"}')
    for job, expected in (
        (SlurmJob("77"), "run-3"),
        (SlurmJob("77", restart_count=1), "run-2"),
        (SlurmJob("78", restart_count=1), "run-3"),
        (None, "run-3"),
    ):
        monkeypatch.setattr(run_directory, "read_slurm_job", lambda job=job: job)
        assert run_directory._resolve_run_dir(cfg).name == expected
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["dir"] == str(run)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("notes.txt", "File exists"),
        ("notes.txt/run", "Not a directory"),
        ("/proc/nowhere/run", "No such file or directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_can_be_no_directory_is_one_sentence(
    place: str, reason: str, configs, one_rank: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("something else")
    with pytest.raises(ConfigError, match=rf"run.dir=.*{place} cannot be a run directory \({reason}\); set run.dir to"):
        one_rank.train(stage_named("pretrain"), configs["pretrain"], tmp_path / place, "engine.kind=plain")
    assert folders(tmp_path / "notes.txt") == ["notes.txt"]


def test_a_folder_that_is_not_to_be_looked_into_is_one_sentence(
    configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock instead of a real folder: the tests may run as root, which may read any folder."""
    from foveal.training import run_directory

    def forbidden(_: object) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied", "run")

    stage = stage_named("pretrain")
    cfg = load_config(stage.config_class, "pretrain", str(configs["pretrain"]), [f"run.dir={tmp_path / 'run'}"])
    monkeypatch.setattr(run_directory, "_resolve_run_dir", forbidden)
    with pytest.raises(
        ConfigError, match=r"run cannot be a run directory \(Permission denied\); set run.dir to a place"
    ):
        run_directory.inspect_run_dir(stage.functions.build_plan(cfg, 1))


def test_a_run_that_another_attempt_finishes_meanwhile_is_let_alone(
    configs, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is unfinished when the directory is inspected and finished when the lease is acquired."""
    from foveal.training import run_directory

    stage, run = stage_named("pretrain"), tmp_path / "run"
    cfg = load_config(stage.config_class, "pretrain", str(configs["pretrain"]), [f"run.dir={run}"])
    run.mkdir()
    (run / "finished.json").write_text("{}")
    monkeypatch.setattr(run_directory, "inspect_run_dir", lambda plan: (run, False, plan))
    world = World(0, 1, 0, "none", torch.device("cpu"))
    with run_directory.open_run("pretrain", stage.functions.build_plan(cfg, 1), world, Preemption(world)) as opened:
        assert opened is None
    assert json.loads((run / "attempts/0001.end.json").read_text())["code"] == 0
    assert folders(run / "finished.json") == ["attempts", "finished.json"]


def test_a_run_that_is_started_in_vain_says_so_where_it_is_watched(configs, one_rank: Ranks, tmp_path: Path) -> None:
    """Else the tracker would show "running" for ever: the last attempt with an open tracker was killed."""
    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=2")
    (run / "tags.json").write_text('{"state": "running"}')
    for number in (2, 3):
        for part, facts in {
            "": {"host": "gone"},
            ".start": {"step": 2},
            ".end": {"code": 5, "why": "a rank was lost"},
        }.items():
            (run / "attempts" / f"{number:04d}{part}.json").write_text(json.dumps(facts))
    with pytest.raises(RestartLoopError, match="a rank was lost"):
        one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.max_attempts_without_progress=2")
    tags = json.loads((run / "tags.json").read_text())
    assert tags["state"] == "failed"
    assert "each of the last 2 attempts ended" in tags["why_stopped"]


def test_a_run_that_is_set_back_and_comes_again_goes_in_circles(tmp_path: Path) -> None:
    for step in (0, 100, 50, 100, 50):
        lease = acquire_lease(tmp_path, current_holder(1), max_attempts_without_progress=4)
        lease.record_start(step)
        lease.record_end_and_release("killed", 137, step)
    lease = acquire_lease(tmp_path, current_holder(1), max_attempts_without_progress=4)
    with pytest.raises(
        RestartLoopError, match="each of the last 4 attempts ended without a checkpoint newer than step 100"
    ):
        lease.record_start(100)


def keep_rules(world: World, config: str, run: str, *overrides: str) -> tuple[str, int]:
    """Return the data path and the decode version of a rank, whose path is its own."""
    settings = [f"run.dir={run}", f"data.path=/node{world.rank}", *overrides]
    data = keep_rules_of_run(
        load_config(stage_named("pretrain").config_class, "pretrain", config, settings), world
    ).data
    return data.path, data.decode_version


def test_a_run_without_a_setting_keeps_its_rule_and_every_rank_its_paths(
    configs, two_ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "science.json").write_text('{"seed": 0}')
    assert two_ranks.call(keep_rules, str(configs["pretrain"]), str(tmp_path)) == [("/node0", 1), ("/node1", 1)]


def test_a_fork_goes_on_by_the_rules_of_its_source(configs, one_rank: Ranks, tmp_path: Path) -> None:
    source, fork = tmp_path / "source", tmp_path / "fork"
    for folder in (source, fork):
        folder.mkdir()
    (source / "science.json").write_text('{"seed": 0}')

    def version(*overrides: str) -> int:
        return one_rank.call(keep_rules, str(configs["pretrain"]), str(fork), *overrides)[0][1]

    assert version() == 2
    assert [version(f"run.fork={source}{step}") for step in ("", "@3")] == [1, 1]
    assert version(f"run.fork={source}", "data.decode_version=2") == 2
    assert version(f"run.fork={tmp_path / 'nowhere'}") == 2
    (fork / "science.json").write_text('{"seed": 0, "data.decode_version": 2}')
    assert version(f"run.fork={source}") == 2
