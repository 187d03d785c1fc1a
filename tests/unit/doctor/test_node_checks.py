"""Limits of a process, and the place of a rank on its node, as `foveal doctor` checks them."""

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from foveal.doctor import node_checks
from foveal.doctor.report import RankReport


@pytest.mark.parametrize(("needed", "ranks"), [(515, 1), (760, 8), (4096, 1024)])
def test_few_files(needed: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three connections of every rank to rank 0, and 512 to 1,024 files more: a node of 8 ranks starts with 1,024."""
    rank_report = RankReport("node1", 0)
    for allowed in (needed - 1, needed, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        node_checks.check_open_file_limit(rank_report, ranks)
    ((kind, sentence),) = rank_report.faults
    assert kind == "config"
    assert sentence.startswith(f"a process may open {needed - 1} files, and {ranks} ranks need {needed}: raise the")


@pytest.mark.parametrize(
    ("limit", "nodes", "environment", "kinds"),
    [
        (8 << 20, "node[1-2]", {}, ["config"]),
        (256 << 20, "node[1-2]", {}, ["note"]),
        (resource.RLIM_INFINITY, "node[1-2]", {}, []),
        (8 << 20, "node1", {}, []),  # one node needs no network
        (8 << 20, "node[1-2]", {"NCCL_IB_DISABLE": "1"}, []),
    ],
)
def test_infiniband_without_memory_that_it_may_register(
    limit: int,
    nodes: str,
    environment: dict[str, str],
    kinds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The network would be blamed: NCCL says no more than "unhandled system error"."""
    ranks = "4" if nodes == "node1" else "2(x2)"
    placed = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": ranks}
    for name, value in (placed | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node_checks, "INFINIBAND_FOLDER", tmp_path / "infiniband")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    rank_report = RankReport("node2", 2)
    node_checks.check_locked_memory_limit(rank_report, 4)
    assert rank_report.faults == [], "without InfiniBand nothing is registered"
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    node_checks.check_locked_memory_limit(rank_report, 4)
    assert [kind for kind, _ in rank_report.faults] == kinds
    assert all("InfiniBand registers more" in sentence for _, sentence in rank_report.faults)


@pytest.mark.parametrize(("cpus", "is_far"), [({1, 2}, True), ({3, 4}, False), ({9}, False)])
def test_a_rank_on_the_other_socket_than_its_gpu(
    cpus: set[int], is_far: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm deals ranks to sockets in turn, unless --distribution says otherwise; GPUs are numbered along sockets."""
    gpu = tmp_path / "0000:1f:00.0"
    gpu.mkdir()
    (gpu / "local_cpulist").write_text("4-7,9\n")
    monkeypatch.setattr(node_checks, "PCI_FOLDER", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)
    own = node_checks._format_pci_address(SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1F, pci_device_id=0))
    unknown = node_checks._format_pci_address(SimpleNamespace())
    rank_report = RankReport("node1", 0)
    for address in (own, "0000:2f:00.0", unknown):
        node_checks.check_cpu_affinity(rank_report, address)
    assert [kind for kind, _ in rank_report.faults] == ["note"] * is_far
    assert all("no CPU next to its GPU 0000:1f:00.0 (4-7,9)" in sentence for _, sentence in rank_report.faults)
