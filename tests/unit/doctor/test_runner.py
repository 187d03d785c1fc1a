"""A rank of a preflight: what it asks of storage that all ranks share."""

import shutil
from pathlib import Path

import pytest
from ranks import stage_named

from foveal.data.storage.folder import LocalFolder
from foveal.distributed.launcher import LaunchEnv
from foveal.doctor import runner
from foveal.errors import DataError


def test_one_rank_of_a_node_looks_at_the_shards(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 shards have 20,000 files to stat, and a node has many ranks."""
    folder = shutil.copytree(digits, tmp_path / "copy")
    next(folder.glob("train-*.tar")).unlink()
    listed: list[LocalFolder] = []
    sizes = LocalFolder.file_sizes
    monkeypatch.setattr(LocalFolder, "file_sizes", lambda found: listed.append(found) or sizes(found))
    overrides = [f"data.path={folder}", f"run.dir={tmp_path / 'run'}"]
    options = runner.PreflightOptions("pretrain", "pretrain/digits", overrides, 0.8, 1.0)
    stage = stage_named("pretrain")
    planned = runner._plan_run(stage, options, LaunchEnv(9, 16, 1, "srun"))
    assert planned.plan.world_size == 16 and not listed
    with pytest.raises(DataError, match="is missing"):
        runner._plan_run(stage, options, LaunchEnv(8, 16, 0, "srun"))
