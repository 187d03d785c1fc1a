"""One rank of a node looks at the files of a data set: 8 ranks would stat 10,000 shards 8 times."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.storage.folder import LocalFolder
from foveal.data.storage.listing import is_listing_rank, list_files_if
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.errors import DataError
from foveal.training import launch
from foveal.training.stage import Stage, StageFunctions


def open_digits(folder: Path) -> Dataset:
    return Dataset.open(DataConfig.from_dict({"path": str(folder), "image_size": 8, "channels": 1}, "the test"))


def test_the_other_ranks_of_a_node_list_nothing(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits, folder)
    next(folder.glob("*.tar")).unlink()
    listed: list[LocalFolder] = []
    sizes = LocalFolder.file_sizes
    monkeypatch.setattr(LocalFolder, "file_sizes", lambda found: listed.append(found) or sizes(found))
    with list_files_if(False):
        assert open_digits(folder).num_samples("train")
    assert not listed
    with list_files_if(True), pytest.raises(DataError, match=r"is missing, and manifest\.json lists it"):
        open_digits(folder)
    with pytest.raises(DataError, match="is missing"):
        open_digits(folder)
    assert len(listed) == 2


@pytest.mark.parametrize(("rank", "local_rank", "lists"), [(0, 0, True), (8, 0, True), (9, 1, False)])
def test_a_stage_is_planned_with_one_listing_a_node(rank: int, local_rank: int, lists: bool) -> None:
    seen: list[bool] = []

    def build_plan(_cfg: Any, _size: int) -> Any:
        seen.append(is_listing_rank())
        raise DataError("that is enough")

    functions: Any = StageFunctions(build_plan, train=None, build=None)  # pyright: ignore[reportArgumentType]
    stage: Any = Stage("pretrain", config_class=None, import_functions=lambda: functions)  # pyright: ignore[reportArgumentType]
    world = World(rank, 1, local_rank, "srun", torch.device("cpu"))
    with pytest.raises(DataError, match="that is enough"):
        launch._execute_run(stage, world, Preemption(world), None)  # pyright: ignore[reportArgumentType]
    assert seen == [lists]
