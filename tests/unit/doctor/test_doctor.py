"""`foveal doctor` without other processes: the verdict and the single checks."""

import os
import re
import socket
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from plans import forecast

from foveal.distributed.gpu_allocation import check_slurm_gpus
from foveal.distributed.launcher import LaunchEnv
from foveal.doctor import node_checks, run_checks
from foveal.doctor.report import RankReport, classify_error
from foveal.doctor.table import format_node_table
from foveal.doctor.verdict import Verdict, judge_reports
from foveal.errors import BadNodeError, DataError, LaunchError, StorageUnreachableError


def report(name: str = "node1", rank: int = 0, **facts: Any) -> RankReport:
    return RankReport(name, rank, facts)


def judge(*reports: RankReport, silent: dict[int, tuple[str, str]] | None = None) -> Verdict:
    return judge_reports(list(reports), silent or {}, min_relative_matmul_rate=0.8)


# --- the verdict ---


def test_like_nodes_are_fine() -> None:
    ranks = [report(f"node{rank}", rank, bf16_rate=100.0 + rank, commit="a") for rank in range(4)]
    assert judge(*ranks) == Verdict([], {}, 0)


def test_a_slow_rank_is_named() -> None:
    ranks = [report(f"node{rank}", rank, bf16_rate=5e14, fp32_rate=5e13) for rank in range(4)]
    ranks[2].facts["bf16_rate"] = 3.9e14
    sentence = "node2: rank 2 multiplies bf16 matrices at 390 TFLOP/s, 78% of its peers' median of 500"
    assert judge(*ranks) == Verdict([sentence], {"node2": sentence}, 6)
    ranks[2].facts["bf16_rate"] = 4.1e14
    assert judge(*ranks).exit_code == 0


def test_one_rank_has_no_peers() -> None:
    assert judge(report(bf16_rate=1.0)).exit_code == 0


def test_a_silent_rank_is_bad_even_if_its_node_is_unknown() -> None:
    assert judge(report(), silent={1: ("node7", "rank 1 did not come")}) == Verdict(
        ["rank 1 did not come"], {"node7": "rank 1 did not come"}, 6
    )
    assert judge(report(), silent={1: ("", "rank 1 did not come")}) == Verdict(["rank 1 did not come"], {}, 6)


def test_a_config_fault_of_all_nodes_is_an_error_of_the_settings() -> None:
    ranks = [report(f"node{rank}", rank) for rank in range(2)]
    ranks[0].add_fault("config", "no such folder")
    assert judge(*ranks).bad_nodes == ["node0"]
    assert judge(*ranks).exit_code == 6
    ranks[1].add_fault("config", "no such folder")
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == ([], 2)


def test_unreachable_storage_on_all_nodes_is_no_nodes_fault() -> None:
    ranks = [report(f"node{rank}", rank) for rank in range(2)]
    for rank in ranks:
        rank.add_fault("reach", "an all-reduce failed")
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == ([], 5)
    ranks[0].faults.clear()
    assert (judge(*ranks).bad_nodes, judge(*ranks).exit_code) == (["node1"], 6)


def test_different_software_is_named() -> None:
    ranks = [report(f"node{rank}", rank, commit="a", **{"version of torch": "2.15"}) for rank in range(3)]
    ranks[1].facts["commit"] = "b"
    sentence = "node1: the commit is b, elsewhere it is a"
    assert judge(*ranks) == Verdict([sentence], {"node1": sentence}, 6)


def test_two_ranks_on_one_gpu_are_a_mistake_of_the_launch() -> None:
    ranks = [report(f"node{rank // 2}", rank, gpu_uuid=f"GPU-{rank % 2}") for rank in range(4)]
    assert judge(*ranks).exit_code == 0, "the same name on another node is another GPU"
    for rank in ranks:
        rank.facts["gpu_uuid"] = "GPU-0"
    sentences = [f"node{node}: ranks {2 * node}-{2 * node + 1} are on one GPU, GPU-0: " for node in range(2)]
    verdict = judge(*ranks)
    assert (verdict.exit_code, verdict.bad_nodes) == (2, [])
    assert [line.startswith(head) for line, head in zip(verdict.sentences, sentences, strict=True)] == [True, True]


def test_notes_and_clocks_leave_the_exit_code_0() -> None:
    first, second = report("node1", 0, skew=0.1), report("node2", 1, skew=-90.0)
    first.add_fault("note", "MLflow does not answer")
    verdict = judge(first, second)
    assert (verdict.bad_nodes, verdict.exit_code) == ([], 0)
    assert verdict.sentences == [
        "node1: MLflow does not answer",
        "node2: its clock is -90.0 s off that of rank 0; log times will not match",
    ]


def test_the_table_has_a_line_for_each_node_and_its_worst_rank() -> None:
    ranks = [report("node1", 0, bf16_rate=5e12), report("node1", 1, bf16_rate=4e12)]
    head, first, second = format_node_table(ranks, {2: ("node2", "gone")}, ["node2"])
    assert head.split()[:3] == ["node", "ranks", "device"]
    assert first.split()[:2] == ["node1", "2"] and " 4 " in first and first.endswith("fine")
    assert second.split()[:2] == ["node2", "-"] and second.endswith("BAD")


def test_unreachable_storage_and_wrong_data_differ_in_kind() -> None:
    assert (classify_error(StorageUnreachableError("no answer")), classify_error(DataError("no such shard"))) == (
        "reach",
        "config",
    )


# --- single checks ---


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "kinds"), [(60e6, ["node"]), (5e8, ["note"]), (8e9, [])])
def test_shared_memory_that_is_short(free: float, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda _: Usage(int(16e9), 0, int(free)))
    rank_report = report()
    node_checks.check_shared_memory(rank_report)
    assert [kind for kind, _ in rank_report.faults] == kinds


def test_rates_are_positive_and_of_both_types() -> None:
    rank_report = report()
    node_checks.measure_matmul_rates(rank_report, torch.device("cpu"))
    assert rank_report.facts["fp32_rate"] > 1e6
    assert rank_report.facts["bf16_rate"] > 1e6


def check_with_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> RankReport:
    """Return the report of a GPU check with a fake nvidia-smi that runs ``script``."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    rank_report = report()
    node_checks.check_gpu_health(rank_report, "GPU-b", 0)
    return rank_report


def test_a_gpu_with_errors_or_throttled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = "echo '0, GPU-a, 7, 0x0, 40'; echo '1, GPU-b, 0, 0x0000000000000001, 41'"
    assert check_with_nvidia_smi(tmp_path, monkeypatch, healthy).faults == []
    broken = check_with_nvidia_smi(tmp_path, monkeypatch, "echo '1, GPU-b, 3, 0x0000000000000048, 91'")
    assert broken.faults == [
        ("node", "GPU 0 counts 3 uncorrected memory errors: it must be reset or replaced"),
        ("node", "GPU 0 is throttled at 91 degrees (hardware slowdown, hardware thermal slowdown)"),
    ]
    lost = check_with_nvidia_smi(
        tmp_path, monkeypatch, "echo 'Unable to determine the device handle: GPU is lost' >&2; exit 15"
    )
    assert lost.faults == [("node", "nvidia-smi fails (Unable to determine the device handle: GPU is lost)")]
    assert check_with_nvidia_smi(tmp_path, monkeypatch, "echo '1, GPU-b, [N/A], [N/A], 41'").faults == []


STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURMD_NODENAME": "node2"}


@pytest.mark.parametrize(
    ("environment", "detected", "error", "sentence"),
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
        (
            {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"},  # --gpus-per-task=1
            1,
            None,
            (
                "each rank sees 1 of the 2 GPUs of node2 (--gpus-per-task, or a binding of its own): NCCL may copy "
                "through host memory instead of NVLink; ask for --gpus-per-node=2"
            ),
        ),
        (
            {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
            1,
            None,
            "",  # the placement is unknown
        ),
        (
            {"SLURM_GPUS_ON_NODE": "1"},
            1,
            LaunchError,
            "2 ranks share 1 GPU on node2: start one rank per GPU, --ntasks-per-node=1",
        ),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8, None, "6 of 8 GPUs on node2 have no rank: --ntasks-per-node=8 uses all"),
        ({"SLURM_GPUS_ON_NODE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, 8, None, ""),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1"}, 8, None, ""),  # the placement is unknown
        ({}, 0, None, ""),
        ({"SLURM_GPUS_ON_NODE": "0"}, 0, None, ""),
    ],
)
def test_the_gpus_that_slurm_gave_are_visible_and_used(
    environment: dict[str, str], detected: int, error: type | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on each of two nodes, unless the variables state others."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA_", "LOCAL_"))]:
        monkeypatch.delenv(name)
    for name, value in (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: detected > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: detected)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    rank_report, launch_env = report("node2"), LaunchEnv(2, 4, 0, "srun")
    if error is None:
        node_checks.check_gpu_allocation(rank_report, launch_env)
        assert rank_report.faults == ([("note", sentence)] if sentence else [])
    else:
        with pytest.raises(error, match=re.escape(sentence)) as caught:
            node_checks.check_gpu_allocation(rank_report, launch_env)
        assert classify_error(caught.value) == ("node" if error is BadNodeError else "config")
    monkeypatch.delenv("SLURM_STEP_ID")
    assert check_slurm_gpus(launch_env) is None, "outside a step no GPU is allocated"


def test_a_torch_build_for_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"SLURM_GPUS_ON_NODE": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        BadNodeError, match=r"torch sees none on node2: torch \S+ is built for the CPU; .*--gpus-per-node=0"
    ):
        check_slurm_gpus(LaunchEnv(0, 1, 0, "srun"))


@pytest.mark.parametrize(
    ("free", "existing", "kinds"),
    [(0.5, 0, ["config"]), (0.5, 3, ["config"]), (2.5, 0, ["note"]), (2.5, 2, []), (3.5, 0, [])],
)
def test_existing_checkpoints_need_no_more_space(
    free: float,
    existing: int,
    kinds: list[str],
    configs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With checkpoint.keep=2 there are up to three, the one being written included. A requeued job has two on disk."""
    run_forecast = forecast("pretrain", configs["pretrain"], f"run.dir={tmp_path}", "checkpoint.keep=2")
    for number in range(existing):
        folder = tmp_path / f"checkpoints/step-{number:08d}-attempt-0001"
        folder.mkdir(parents=True)
        (folder / "pieces").write_bytes(bytes(run_forecast.checkpoint_bytes))
    free_bytes = int(free * run_forecast.checkpoint_bytes)
    monkeypatch.setattr(run_checks.shutil, "disk_usage", lambda _: Usage(10 * free_bytes, 0, free_bytes))
    rank_report = report()
    run_checks.check_checkpoint_disk(rank_report, run_checks.PlannedRun(run_forecast.stage, run_forecast.plan))
    assert [kind for kind, _ in rank_report.faults] == kinds


def test_a_tracking_server_that_does_not_answer() -> None:
    rank_report = report()
    for uri in (None, "sqlite:///runs/mlflow.db"):
        run_checks.check_tracking_server(rank_report, uri)
    assert rank_report.faults == []
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        run_checks.check_tracking_server(rank_report, f"http://127.0.0.1:{bound.getsockname()[1]}")
    ((kind, sentence),) = rank_report.faults
    assert kind == "note" and "does not answer" in sentence
