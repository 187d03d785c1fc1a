"""`foveal doctor` without other processes: what counts as a bad node, and what single checks see."""

import os
import re
import resource
import socket
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from plans import forecast

from foveal.distributed.gpu_allocation import check_slurm_gpus
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.preflight import expand_node_list, node_names_by_rank
from foveal.doctor import node_checks, run_checks
from foveal.doctor.report import RankReport, classify_error
from foveal.doctor.table import format_node_table
from foveal.doctor.verdict import Verdict, judge_reports
from foveal.errors import BadNodeError, DataError, LaunchError, StorageUnreachableError


def report(name: str = "node1", rank: int = 0, **facts: Any) -> RankReport:
    return RankReport(name, rank, facts)


def judge(*reports: RankReport, silent: dict[int, tuple[str, str]] | None = None) -> Verdict:
    return judge_reports(list(reports), silent or {}, min_relative_rate=0.8)


# --- the verdict ---


def test_like_nodes_are_fine() -> None:
    ranks = [report(f"node{rank}", rank, bf16_rate=100.0 + rank, commit="a") for rank in range(4)]
    assert judge(*ranks) == Verdict([], {}, 0)


def test_a_slow_rank_is_named() -> None:
    ranks = [report(f"node{rank}", rank, bf16_rate=5e14, fp32_rate=5e13) for rank in range(4)]
    ranks[2].facts["bf16_rate"] = 3.9e14
    said = "node2: rank 2 multiplies bf16 matrices at 390 TFLOP/s, 78% of its peers' median of 500"
    assert judge(*ranks) == Verdict([said], {"node2": said}, 6)
    ranks[2].facts["bf16_rate"] = 4.1e14
    assert judge(*ranks).exit_code == 0


def test_one_rank_has_no_peers() -> None:
    assert judge(report(bf16_rate=1.0)).exit_code == 0


def test_a_rank_that_said_nothing_is_bad_also_where_its_node_is_not_known() -> None:
    assert judge(report(), silent={1: ("node7", "rank 1 did not come")}) == Verdict(
        ["rank 1 did not come"], {"node7": "rank 1 did not come"}, 6
    )
    assert judge(report(), silent={1: ("", "rank 1 did not come")}) == Verdict(["rank 1 did not come"], {}, 6)


def test_what_is_wrong_everywhere_is_the_settings() -> None:
    ranks = [report(f"node{rank}", rank) for rank in range(2)]
    ranks[0].add_fault("config", "no such folder")
    assert judge(*ranks).bad_nodes == ["node0"]
    assert judge(*ranks).exit_code == 6
    ranks[1].add_fault("config", "no such folder")
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == ([], 2)


def test_what_nobody_reaches_is_no_nodes_fault() -> None:
    ranks = [report(f"node{rank}", rank) for rank in range(2)]
    for each in ranks:
        each.add_fault("reach", "an all-reduce failed")
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == ([], 5)
    ranks[0].faults.clear()
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == (["node1"], 6)


def test_other_software_is_found() -> None:
    ranks = [report(f"node{rank}", rank, commit="a", **{"version of torch": "2.15"}) for rank in range(3)]
    ranks[1].facts["commit"] = "b"
    said = "node1: the commit is b, elsewhere it is a"
    assert judge(*ranks) == Verdict([said], {"node1": said}, 6)


def test_notes_and_clocks_spoil_nothing() -> None:
    one, other = report("node1", 0, skew=0.1), report("node2", 1, skew=-90.0)
    one.add_fault("note", "MLflow does not answer")
    verdict = judge(one, other)
    assert (verdict.bad_nodes, verdict.exit_code) == ([], 0)
    assert verdict.sentences == [
        "node1: MLflow does not answer",
        "node2: its clock is -90.0 s off that of rank 0; logs will not fit",
    ]


def test_the_table_has_a_line_for_each_node_and_its_worst_rank() -> None:
    ranks = [report("node1", 0, bf16_rate=5e12), report("node1", 1, bf16_rate=4e12)]
    head, first, second = format_node_table(ranks, {2: ("node2", "gone")}, ["node2"])
    assert head.split()[:3] == ["node", "ranks", "device"]
    assert first.split()[:2] == ["node1", "2"] and " 4 " in first and first.endswith("fine")
    assert second.split()[:2] == ["node2", "-"] and second.endswith("BAD")


def test_storage_that_does_not_answer_is_another_matter_than_a_mistake() -> None:
    assert (classify_error(StorageUnreachableError("no answer")), classify_error(DataError("no such shard"))) == (
        "reach",
        "config",
    )


# --- Slurm's names ---


def test_host_lists() -> None:
    assert expand_node_list("a[01-03,7],c,d[1-2]x[8-9]") == [
        "a01",
        "a02",
        "a03",
        "a7",
        "c",
        "d1x8",
        "d1x9",
        "d2x8",
        "d2x9",
    ]
    assert expand_node_list("") == []


def test_ranks_are_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-3]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2),1")
    assert node_names_by_rank(5) == ["n1", "n1", "n2", "n2", "n3"]
    assert node_names_by_rank(6) == []


# --- single checks ---


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "kinds"), [(60e6, ["node"]), (5e8, ["note"]), (8e9, [])])
def test_shared_memory_that_is_short(free: float, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _: Usage(int(16e9), 0, int(free)))
    found = report()
    node_checks.check_shared_memory(found)
    assert [kind for kind, _ in found.faults] == kinds


def test_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    found = report()
    node_checks.check_open_file_limit(found)
    assert found.faults == [("config", "a process may open 256 files: set `ulimit -n 4096` in the job script")]


def test_rates_are_positive_and_of_both_types() -> None:
    found = report()
    node_checks.measure_matmul_rates(found, torch.device("cpu"))
    assert found.facts["fp32_rate"] > 1e6
    assert found.facts["bf16_rate"] > 1e6


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> RankReport:
    """What is found with an nvidia-smi that says this."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    found = report()
    node_checks.check_gpu_health(found, "GPU-b", 0)
    return found


def test_a_gpu_with_errors_or_throttled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = "echo '0, GPU-a, 7, 0x0, 40'; echo '1, GPU-b, 0, 0x0000000000000001, 41'"
    assert smi(tmp_path, monkeypatch, healthy).faults == []
    broken = smi(tmp_path, monkeypatch, "echo '1, GPU-b, 3, 0x0000000000000048, 91'")
    assert broken.faults == [
        ("node", "GPU 0 counts 3 uncorrected memory errors: it must be reset or replaced"),
        ("node", "GPU 0 is throttled at 91 degrees (hardware slowdown, hardware thermal slowdown)"),
    ]
    lost = smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle: GPU is lost' >&2; exit 15")
    assert lost.faults == [("node", "nvidia-smi fails (Unable to determine the device handle: GPU is lost)")]
    assert smi(tmp_path, monkeypatch, "echo '1, GPU-b, [N/A], [N/A], 41'").faults == []


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2"}


@pytest.mark.parametrize(
    ("environment", "there", "error", "sentence"),
    [
        (
            {"SLURM_GPUS_ON_NODE": "4"},
            0,
            BadNodeError,
            "Slurm gave 4 GPUs, torch sees none on node2: the driver does not fit",
        ),
        (
            {"SLURM_STEP_GPUS": "2,3", "CUDA_VISIBLE_DEVICES": "-1"},
            0,
            BadNodeError,
            "sees none on node2: CUDA_VISIBLE_DEVICES='-1'",
        ),
        ({"SLURM_JOB_GPUS": "0"}, 0, BadNodeError, "Slurm gave 1 GPU, torch sees none"),
        ({"SLURM_GPUS_ON_NODE": "4"}, 3, BadNodeError, "Slurm gave this rank 4 GPUs, torch sees 3 on node2"),
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"}, 1, None, ""),  # --gpus-per-task=1
        (
            {"SLURM_GPUS_ON_NODE": "1"},
            1,
            LaunchError,
            "2 ranks share 1 GPU on node2: start one a GPU, --ntasks-per-node=1",
        ),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, None, "6 of 8 GPUs on node2 have no rank: --ntasks-per-node=8 uses all"),
        ({"SLURM_GPUS_ON_NODE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8, None, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1"}, 8, None, ""),  # nobody knows who is where
        ({}, 0, None, ""),
        ({"SLURM_GPUS_ON_NODE": "0"}, 0, None, ""),
    ],
)
def test_the_gpus_that_slurm_gave_are_there_and_used(
    environment: dict[str, str], there: int, error: type | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on each of two nodes, unless torchrun says otherwise."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA_", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name, value in (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found, here = report("node2"), LaunchEnv(2, 4, 0, "srun")
    if error is None:
        node_checks.check_gpu_allocation(found, here)
        assert found.faults == ([("note", sentence)] if sentence else [])
    else:
        with pytest.raises(error, match=re.escape(sentence)) as caught:
            node_checks.check_gpu_allocation(found, here)
        assert classify_error(caught.value) == ("node" if error is BadNodeError else "config")
    monkeypatch.delenv("SLURM_STEP_ID")
    assert check_slurm_gpus(here) is None, "outside a step nothing is given"


def test_a_torch_for_the_cpu_is_named_where_gpus_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"SLURM_GPUS_ON_NODE": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        BadNodeError, match=r"torch sees none on node2: torch \S+ is built for the CPU; .*--gpus-per-node=0"
    ):
        check_slurm_gpus(LaunchEnv(0, 1, 0, "srun"))


@pytest.mark.parametrize(
    ("free", "kept", "kinds"),
    [(0.5, 0, ["config"]), (0.5, 3, ["config"]), (2.5, 0, ["note"]), (2.5, 2, []), (3.5, 0, [])],
)
def test_what_is_there_already_needs_no_room(
    free: float, kept: int, kinds: list[str], configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """checkpoint.keep=2: with the one that is written, three. A job that is requeued finds two of them there."""
    made = forecast("pretrain", configs["pretrain"], f"run.dir={tmp_path}", "checkpoint.keep=2")
    for number in range(kept):
        folder = tmp_path / f"checkpoints/step-{number:08d}-attempt-0001"
        folder.mkdir(parents=True)
        (folder / "pieces").write_bytes(bytes(made.checkpoint_bytes))
    room = int(free * made.checkpoint_bytes)
    monkeypatch.setattr(run_checks.shutil, "disk_usage", lambda _: Usage(10 * room, 0, room))
    found = report()
    run_checks.check_disk(found, run_checks.PlannedRun(made.stage, made.plan))
    assert [kind for kind, _ in found.faults] == kinds


def test_a_tracking_server_that_does_not_answer() -> None:
    found = report()
    for harmless in (None, "sqlite:///runs/mlflow.db"):
        run_checks.check_tracking_server(found, harmless)
    assert found.faults == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        run_checks.check_tracking_server(found, f"http://127.0.0.1:{taken.getsockname()[1]}")
    ((kind, sentence),) = found.faults
    assert kind == "note" and "does not answer" in sentence
