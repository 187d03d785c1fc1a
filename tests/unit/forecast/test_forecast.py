"""`foveal plan`: what engines hold, what Slurm allows, what will not do, and the command line."""

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plans import forecast
from typer.testing import CliRunner

from foveal.cli import app
from foveal.engines.base import EngineConfig
from foveal.errors import ConfigError
from foveal.forecast.cli import resolve_stage_name
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.forecast.gpu_specs import find_gpu_spec
from foveal.forecast.memory import estimate_memory
from foveal.forecast.problems import JobLimits, count_attempts, find_problems
from foveal.forecast.slurm_limits import (
    JobScriptRequest,
    SlurmPartition,
    find_slurm_partition,
    list_slurm_partitions,
    parse_slurm_time,
    read_job_script_request,
)
from foveal.forecast.trace import MemoryTrace, ParameterCounts
from foveal.optim.optimizers import OptimConfig

MILLION = 10**6
WEIGHTS = ParameterCounts(
    MILLION, 900_000, (100_000,) * 9 + (50_000,) * 2, (400_000,) * 2, frozen_bytes=7, frozen_checkpoint_bytes=0
)
TRACE = MemoryTrace({0: 3 * MILLION, 2 * MILLION: 2 * MILLION, 4 * MILLION: MILLION})
ADAMW = OptimConfig()
NOBODY = JobLimits(None, None, "nobody")


def held(ranks: int = 4, micros: int = 2, optim: OptimConfig = ADAMW, **engine: Any) -> Any:
    return estimate_memory(WEIGHTS, TRACE, EngineConfig(**engine), optim, world_size=ranks, num_microbatches=micros)


# --- what engines hold: W = 4 MB of weights ---


def test_one_process_holds_weights_gradients_and_two_moments() -> None:
    found = held(1, kind="plain")
    assert (found.weights, found.moments, found.gradients) == (4e6 + 7, 8e6, 4e6)
    assert found.peak == 7 + 12e6 + 4e6 + 3e6
    assert held(1, 1, kind="plain").peak == 7 + 12e6 + 5e6  # one micro: gradients grow as activations go, 1 + 4


def test_sgd_and_lars_keep_one_moment_and_none_without_momentum() -> None:
    for kind, momentum, moments in (("sgd", 0.9, 4e6), ("lars", 0.9, 4e6), ("sgd", 0.0, 0.0)):
        optim = OptimConfig.model_validate({"kind": kind, "momentum": momentum})
        assert held(1, optim=optim, kind="plain").moments == moments
    assert held(4, optim=OptimConfig(kind="sgd"), kind="accelerate", sharding="fsdp2").moments == 1e6


def test_ddp_keeps_copies_to_reduce() -> None:
    assert held(2, kind="accelerate").peak == held(1, kind="plain").peak + 4e6


def test_zero_1_and_2_deal_out_masters_moments_and_then_gradients() -> None:
    bucket = {"zero_optimization": {"reduce_bucket_size": MILLION}}
    first = held(kind="deepspeed", zero=1, deepspeed=bucket)
    assert (first.weights - 7, first.moments, first.gradients, first.buffers) == (5e6, 2e6, 4e6, 4e6)
    assert first.peak == 7 + 7e6 + max(4e6 + 4e6 + 3e6, 4e6 + 4e6 + 4e6 + 1e6)  # a micro; reducing what it left
    second = held(kind="deepspeed", zero=2, deepspeed=bucket)
    assert second.gradients == 1e6
    assert second.peak == 7 + 7e6 + max(1e6 + 3e6, 1e6 + 4e6 + 2e6, 1e6 + 4e6 + 4e6 + 1e6)  # reducing needs most
    assert held(kind="deepspeed", zero=1).buffers == 2e9  # DeepSpeed's own buckets
    assert held(kind="deepspeed", zero=1, precision="bf16").buffers == 4e9  # one for each type that travels


@pytest.mark.parametrize(
    ("sharing", "way_out"), [("ddp", "engine.sharding=fsdp2"), ("deepspeed", "engine.zero=")], ids=["ddp", "deepspeed"]
)
def test_every_way_to_share_is_a_way_out(sharing: str, way_out: str, configs: dict[str, Path]) -> None:
    """As many ranks as hold a half of what one needs beside the micro."""
    small = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}" if sharing == "deepspeed" else "seed=3"
    wide = "model={name: vit_tiny_patch16_224, patch: 4, width: 512, depth: 8, heads: 8}"
    words = ["init=null", wide, f"engine.sharding={sharing}", "engine.zero=0", small]
    found = forecast("finetune", configs["finetune"], *words, ranks=8, memory=1.9e9)
    ((fatal, sentence),) = sentences(found)
    assert fatal
    assert f"set {way_out}" in sentence


def test_zero_3_deals_out_all_but_what_is_small() -> None:
    found = held(kind="deepspeed", zero=3, deepspeed={"zero_optimization": {"reduce_bucket_size": MILLION}})
    large = 0  # 100,000 numbers are not more than the threshold
    assert found.weights - 7 == 2e6 + 4e6 + large
    one = {"zero_optimization": {"reduce_bucket_size": MILLION, "stage3_param_persistence_threshold": 60_000}}
    other = held(kind="deepspeed", zero=3, deepspeed=one)
    assert other.weights == found.weights  # gathered for use instead


def test_more_ranks_need_less_each() -> None:
    for zero in (1, 2, 3):
        peaks = [held(ranks, kind="deepspeed", zero=zero).peak for ranks in (1, 2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)


def test_fsdp2_holds_shards_and_two_blocks() -> None:
    found = held(kind="accelerate", sharding="fsdp2")
    assert (found.weights - 7, found.moments, found.gradients) == (1e6, 2e6, 1e6)
    assert found.buffers == 4 * (2 * 200_000 + 4 * 400_000)


# --- Slurm ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30:00", 131400), ("UNLIMITED", None)],
)
def test_slurms_times(text: str, seconds: float | None) -> None:
    assert parse_slurm_time(text) == seconds


def scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A command of that name, in front of all others."""
    file = folder / "scontrol"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


PARTITIONS = """\
cat <<'END'
PartitionName=long AllowGroups=ALL Default=NO DefaultTime=NONE GraceTime=0 MaxNodes=2 MaxTime=7-00:00:00 TotalNodes=9
PartitionName=short AllowGroups=ALL Default=YES DefaultTime=01:00:00 GraceTime=30 MaxNodes=UNLIMITED MaxTime=4:00:00 TotalNodes=9
END"""


def test_partitions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, monkeypatch, PARTITIONS)
    assert find_slurm_partition(None) == SlurmPartition("short", 14400, 3600, 30, 9)
    assert find_slurm_partition("long") == SlurmPartition("long", 604800, None, 0, 2)
    with pytest.raises(ConfigError, match=r"--partition middle does not exist; there are: short, long"):
        find_slurm_partition("middle")


def test_a_slurm_that_does_not_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol(tmp_path, monkeypatch, "exit 1")
    assert list_slurm_partitions() == []
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert list_slurm_partitions() == []


def test_the_job_scripts_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert read_job_script_request("pretrain") == JobScriptRequest("slurm/pretrain_mae.sh", 86400, 180)
    monkeypatch.chdir(tmp_path)
    assert read_job_script_request("pretrain") is None


# --- what will not do ---

Make = Callable[..., Forecast]


@pytest.fixture(scope="module")
def tiny(configs: dict[str, Path]) -> Make:
    """A forecast of the tiny pretraining on a machine."""

    def make(*overrides: str, ranks: int = 1, **machine: Any) -> Forecast:
        return forecast("pretrain", configs["pretrain"], *overrides, ranks=ranks, **machine)

    return make


def sentences(found: Forecast, limits: JobLimits = NOBODY, *slurm: Any) -> list[tuple[bool, str]]:
    return [(each.fatal, each.sentence) for each in find_problems(found, limits, *(slurm or (None, None)))]


def test_a_small_run_has_no_problems(tiny: Make) -> None:
    assert sentences(tiny(rate=1e12, memory=80e9), JobLimits(3600, 180, "x")) == []


def test_a_memory_that_is_too_small_is_said_with_a_way_out(tiny: Make) -> None:
    size = 2.0e9  # the 1.5 GB beside tensors, and little more
    found = tiny("engine.zero=1", ranks=2, memory=size)
    ((fatal, sentence),) = sentences(found)
    assert fatal and sentence.startswith("memory: a GPU needs ")
    assert sentence.endswith("no sharing, recomputation or smaller batch.at_once makes it fit")  # DeepSpeed's buckets
    small = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    large = tiny("batch.images=1024", "batch.at_once=1024", "data.image_size=64", small, memory=size)
    ((fatal, sentence),) = sentences(large)
    way_out = sentence.rpartition("; set ")[2].split()
    assert fatal and way_out
    kept = ("batch.images=1024", "batch.at_once=1024", "data.image_size=64", small)
    assert sentences(tiny(*kept, *way_out, memory=size)) == []


def test_times_that_do_not_fit(tiny: Make) -> None:
    found = tiny("checkpoint.every=5", rate=tiny().flops_per_step / 0.4 / 100)  # 100 s a step
    assert found.step_seconds == pytest.approx(100)
    assert found.total_seconds == pytest.approx(2200)
    limits = JobLimits(600, 60, "the script")  # 360 s between start and notice
    ((fatal, sentence),) = sentences(found, limits)
    assert fatal and "ends before its first checkpoint" in sentence and "checkpoint.every=1" not in sentence[:40]
    assert count_attempts(found, limits) == 7
    assert count_attempts(found, JobLimits(240, 60, "x")) is None
    assert any("nothing is left for a step of 100 s" in said for _, said in sentences(found, JobLimits(300, 60, "x")))


def test_a_notice_shorter_than_a_save(tiny: Make) -> None:
    found = tiny(write_bytes=1e4)
    ((fatal, sentence),) = sentences(found, JobLimits(None, 10, "slurm/pretrain_mae.sh"))
    assert fatal and sentence.startswith(
        "notice: slurm/pretrain_mae.sh asks to be told 10 s before the end, a checkpoint takes "
    )
    assert sentence.endswith(f"--signal=USR1@{-(-2 * found.checkpoint_bytes // 10_000)}")


def test_partitions_that_do_not_fit(tiny: Make) -> None:
    found = replace(tiny(write_bytes=1e4), machine=ClusterSpec(3, 1, 0.4, 1e4))
    partition = SlurmPartition("short", 3600, None, 5, 2)
    said = sentences(
        found, JobLimits(3600, None, "partition short"), partition, JobScriptRequest("slurm/x.sh", 86400, None)
    )
    assert [fatal for fatal, _ in said] == [True, False, False]
    assert [sentence.partition(":")[0] for _, sentence in said] == ["nodes", "time", "preemption"]
    assert "--time=60" in said[1][1]


def test_timeouts_and_disks_that_do_not_fit(tiny: Make) -> None:
    found = tiny("engine.timeout_minutes=1", "data.patience_seconds=5", rate=tiny().flops_per_step / 0.4 / 100)
    assert [(fatal, said[:7]) for fatal, said in sentences(found)] == [(True, "timeout")]
    quick = tiny("checkpoint.every=1", "checkpoint.gigabytes=0.000001", rate=1e18, write_bytes=1e4)
    assert [said.partition(":")[0] for _, said in sentences(quick)] == ["checkpoints", "checkpoints"]


def test_traffic_by_hand(tiny: Make) -> None:
    found = tiny(ranks=2)
    weights = 4 * found.parameter_counts.trainable
    zeros = {0: weights, 1: 1.5 * weights, 2: 1.5 * weights, 3: weights}
    assert found.network_bytes_by_sharding == {f"ZeRO {stage}": pytest.approx(sent) for stage, sent in zeros.items()}


# --- the command ---


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_prints_a_plan(configs: dict[str, Path]) -> None:
    done = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpus-per-node", "2", "--gpu", "h100")
    assert done.exit_code == 0, done.output
    heads = [line[:10].strip() for line in done.output.splitlines() if line[:1] != " "]
    assert {"steps", "lr", "batch", "model", "work", "memory", "disk", "network", "time", "loading"} <= set(heads)
    assert "ZeRO 3" in done.output


def test_the_command_speaks_json(configs: dict[str, Path]) -> None:
    done = run(str(configs["finetune"]), "--stage", "finetune", "--json")
    tree = json.loads(done.output)
    assert tree["runs"] == 1 and tree["steps"] == 22 and tree["step_seconds"] is None
    assert set(tree["memory"]) == {"DDP", "FSDP2"}
    assert tree["memory"]["DDP"]["bf16, recompute"]["peak"] > 0


def test_a_plan_that_cannot_be_is_exit_code_2(configs: dict[str, Path]) -> None:
    done = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpu-memory", "1")
    assert done.exit_code == 2
    assert "cannot    memory: a GPU needs" in done.output
    done = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpus-per-node", "3")
    assert isinstance(done.exception, ConfigError) and done.exception.exit_code == 2
    assert "64" in str(done.exception)


def test_the_stage_is_seen_from_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert resolve_stage_name("configs/distill/mae_vit_s16.yaml", None) == "distill"
    assert resolve_stage_name("mae_vit_b16", None) == "pretrain"
    with pytest.raises(ConfigError, match="give --stage"):
        resolve_stage_name("digits", None)  # three stages have one
    with pytest.raises(ConfigError, match="--stage train does not exist"):
        resolve_stage_name("digits", "train")


def test_gpus_have_names() -> None:
    card = find_gpu_spec("H100")
    assert card.peak_tflops(EngineConfig(precision="bf16")) == 989
    assert card.peak_tflops(EngineConfig()) == 67
    assert card.peak_tflops(EngineConfig(matmul="high")) == 494
    with pytest.raises(ConfigError, match="--gpu k80 is not known"):
        find_gpu_spec("k80")
