"""Limits of cgroups, of both versions, from the group of this process up."""

from pathlib import Path

import pytest
import torch

from foveal import cgroups
from foveal.cgroups import read_cpu_limit, read_memory_left
from foveal.data.memory_file import read_available_memory
from foveal.distributed.world import World
from foveal.training import data_workers

V1, V2 = "5:cpu,cpuacct:/job/step\n4:memory:/job/step\n", "0::/job/step\n"


@pytest.fixture(params=[V1, V2], ids=["version 1", "version 2"])
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own").write_text(request.param)
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "fs")
    return request.param


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def write_memory(tmp_path: Path, version: str, group: str, limit: str) -> None:
    folder = tmp_path / "fs" / ("memory" if version == V1 else "") / group
    names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file") if version == V1 else ("max", "current", "")
    write(folder / f"memory.{names[0]}", limit)
    write(folder / f"memory.{names[1]}", "900000")
    write(folder / "memory.stat", f"anon 5\n{names[2] or 'inactive_file'} 50000")


def write_cpu(tmp_path: Path, version: str, group: str, quota: str) -> None:
    folder = tmp_path / "fs" / ("cpu" if version == V1 else "") / group
    if version == V1:
        write(folder / "cpu.cfs_quota_us", quota.replace("max", "-1"))
        write(folder / "cpu.cfs_period_us", "100000")
    else:
        write(folder / "cpu.max", f"{quota} 100000")


def test_the_closest_memory_limit_counts(version: str, tmp_path: Path) -> None:
    assert read_memory_left() is None
    write_memory(tmp_path, version, "job", "1000000")
    write_memory(tmp_path, version, "job/step", "max" if version == V2 else "9223372036854771712")
    assert read_memory_left() == read_available_memory() == 150_000


def test_the_closest_quota_counts(version: str, tmp_path: Path) -> None:
    assert read_cpu_limit() is None
    write_cpu(tmp_path, version, "job", "250000")
    write_cpu(tmp_path, version, "job/step", "max")
    assert read_cpu_limit() == 2.5


@pytest.mark.parametrize(("quota", "cores"), [("400000", 2), ("150000", 1), ("max", 8)])
def test_ranks_share_the_quota_of_their_container(
    version: str, quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cpu(tmp_path, version, "job", quota)
    monkeypatch.setattr(data_workers.os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(World, "all_gather_objects", lambda _self, own: [own, own])
    assert data_workers._count_own_cores(World(0, 2, 0, "none", torch.device("cpu"))) == cores
