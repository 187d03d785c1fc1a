"""`foveal plan`: memory of the engines, Slurm's limits, problems, and the command line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plans import forecast
from ranks import stage_named
from typer.testing import CliRunner

from foveal.cli import app
from foveal.engines.config import EngineConfig
from foveal.errors import ConfigError
from foveal.forecast import cli as forecast_cli
from foveal.forecast import problems, slurm_limits
from foveal.forecast.cli import resolve_stage_name
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.forecast.gpu_specs import find_gpu_spec
from foveal.forecast.memory import estimate_memory
from foveal.forecast.mfu import mfu_range
from foveal.forecast.problems import JobLimits, count_attempts, find_problems
from foveal.forecast.report import _time_lines
from foveal.forecast.slurm_limits import JobScriptTimes, find_slurm_partition, read_job_script_times
from foveal.forecast.trace import MemoryTrace, ParameterCounts
from foveal.optim.config import OptimConfig
from foveal.slurm import SlurmPartition
from foveal.training.config_files import SHIPPED_CONFIGS

MILLION = 10**6
WEIGHTS = ParameterCounts(
    MILLION, 900_000, (100_000,) * 9 + (50_000,) * 2, (400_000,) * 2, frozen_bytes=7, checkpoint_bytes=0
)
TRACE = MemoryTrace({0: 3 * MILLION, 2 * MILLION: 2 * MILLION, 4 * MILLION: MILLION})
ADAMW = OptimConfig()
NO_LIMITS = JobLimits(None, None, "nobody")


def estimate(ranks: int = 4, micros: int = 2, optim: OptimConfig = ADAMW, **engine: Any) -> Any:
    return estimate_memory(WEIGHTS, TRACE, EngineConfig(**engine), optim, world_size=ranks, accumulation_steps=micros)


# --- memory of the engines, for 4 MB of weights ---


def test_one_process_holds_weights_gradients_and_two_moments() -> None:
    memory = estimate(1, kind="plain")
    assert (memory.weights, memory.moments, memory.gradients) == (4e6 + 7, 8e6, 4e6)
    assert memory.peak == 7 + 12e6 + 4e6 + 3e6
    assert estimate(1, 1, kind="plain").peak == 7 + 12e6 + 5e6  # one microbatch: gradients replace activations, 1 + 4


def test_sgd_and_lars_keep_one_moment_and_none_without_momentum() -> None:
    for kind, momentum, moments in (("sgd", 0.9, 4e6), ("lars", 0.9, 4e6), ("sgd", 0.0, 0.0)):
        optim = OptimConfig.model_validate({"name": kind, "momentum": momentum})
        assert estimate(1, optim=optim, kind="plain").moments == moments
    assert estimate(4, optim=OptimConfig(name="sgd"), kind="accelerate", sharding="fsdp2").moments == 1e6


def test_ddp_keeps_copies_to_reduce() -> None:
    assert estimate(2, kind="accelerate").peak == estimate(1, kind="plain").peak + 4e6


def test_zero_1_and_2_deal_out_masters_moments_and_then_gradients() -> None:
    bucket = {"zero_optimization": {"reduce_bucket_size": MILLION}}
    first = estimate(kind="deepspeed", zero=1, deepspeed=bucket)
    assert (first.weights - 7, first.moments, first.gradients, first.buffers) == (5e6, 2e6, 4e6, 8e6)
    assert first.peak == 7 + 7e6 + max(4e6 + 8e6 + 3e6, 8e6 + 4e6 + 1e6)  # a microbatch; its reduction
    second = estimate(kind="deepspeed", zero=2, deepspeed=bucket)
    assert second.gradients == 1e6
    assert second.peak == 7 + 7e6 + max(1e6 + 3e6, 1e6 + 8e6 + 2e6, 1e6 + 8e6 + 4e6 + 1e6)  # the reduction is the peak


def test_buckets_are_those_of_the_engine() -> None:
    """Two, because a reduction overlaps the backward pass; again two where linear layers are summed in another type."""
    for zero in (1, 2):
        assert estimate(kind="deepspeed", zero=zero).buffers == 8e6
        assert estimate(kind="deepspeed", zero=zero, precision="bf16").buffers == 8e6
        assert estimate(kind="deepspeed", zero=zero, precision="bf16", reduce_dtype="autocast").buffers == 16e6
    assert (estimate(1, kind="deepspeed").buffers, estimate(kind="deepspeed", zero=3).buffers) == (0, 4e6)
    assert estimate(kind="deepspeed", zero=3, precision="bf16", reduce_dtype="autocast").buffers == 6e6


def test_an_overlapping_reduction_takes_gradients_away_as_they_appear() -> None:
    bucket: dict[str, Any] = {"reduce_bucket_size": 250_000}

    def peak(**keys: Any) -> float:
        return estimate(4, 1, kind="deepspeed", zero=1, deepspeed={"zero_optimization": bucket | keys}).peak - 7 - 7e6

    # Two buckets, and the copy of one that is sent; all gradients, and at the update a bucket, its copy and a partition.
    assert peak() == max(3e6, 2e6 + 2e6 + 1e6, 1e6 + 2e6 + 1e6, 2e6 + 1e6 + 1e6)
    assert peak(overlap_comm=False) == max(1e6 + 4e6, 4e6 + max(1e6, 1e6))  # a bucket's copy, then a partition's
    assert peak(overlap_comm=False, contiguous_gradients=True) == max(4e6 + 1e6 + 1e6, 4e6 + 1e6 + 1e6 + 1e6)


@pytest.mark.parametrize(
    ("sharding", "remedy"), [("ddp", "engine.sharding=fsdp2"), ("deepspeed", "engine.zero=")], ids=["ddp", "deepspeed"]
)
def test_every_sharding_is_a_remedy(sharding: str, remedy: str, configs: dict[str, Path]) -> None:
    """With 8 ranks, whose shards make the state fit."""
    small = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}" if sharding == "deepspeed" else "seed=3"
    wide = "model={name: vit_tiny_patch16_224, patch: 4, width: 512, depth: 8, heads: 8}"
    words = ["init=null", wide, f"engine.sharding={sharding}", "engine.zero=0", small]
    ((fatal, message),) = messages(forecast("finetune", configs["finetune"], *words, ranks=8, gpu_memory_bytes=1.9e9))
    assert fatal
    assert f"set {remedy}" in message


def test_zero_3_deals_out_all_but_what_is_small() -> None:
    options: dict[str, Any] = {"reduce_bucket_size": MILLION}
    memory = estimate(kind="deepspeed", zero=3, deepspeed={"zero_optimization": options})
    large = 0  # 100,000 elements are not above the threshold
    assert memory.weights - 7 == 2e6 + 4e6 + large
    options |= {"stage3_param_persistence_threshold": 60_000}
    partitioned = estimate(kind="deepspeed", zero=3, deepspeed={"zero_optimization": options})
    assert partitioned.weights == memory.weights  # gathered instead of kept


def test_more_ranks_need_less_each() -> None:
    for zero in (1, 2, 3):
        peaks = [estimate(ranks, kind="deepspeed", zero=zero).peak for ranks in (2, 8, 64)]  # one has no buckets
        assert peaks == sorted(peaks, reverse=True)


def test_fsdp2_holds_shards_and_two_blocks() -> None:
    memory = estimate(kind="accelerate", sharding="fsdp2")
    assert (memory.weights - 7, memory.moments, memory.gradients) == (1e6, 2e6, 1e6)
    assert memory.buffers == 4 * (2 * 200_000 + 4 * 400_000)


# --- Slurm ---


def test_a_partition_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = SlurmPartition("short", 14400, 3600, 30, 9), SlurmPartition("long", 604800, None, 0, 2)
    monkeypatch.setattr(slurm_limits, "list_slurm_partitions", lambda _: [short, long])
    assert (find_slurm_partition(None), find_slurm_partition("long")) == (short, long)
    with pytest.raises(ConfigError, match=r"--partition middle does not exist; there are: short, long"):
        find_slurm_partition("middle")
    monkeypatch.setattr(slurm_limits, "list_slurm_partitions", lambda _: [])
    assert find_slurm_partition(None) is None
    with pytest.raises(ConfigError, match=r"there are: none, scontrol lists no partitions"):
        find_slurm_partition("short")


def test_the_job_scripts_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert read_job_script_times("pretrain") == JobScriptTimes("slurm/pretrain_mae.sh", 86400, 180)
    monkeypatch.chdir(tmp_path)
    assert read_job_script_times("pretrain") is None


# --- problems ---

Make = Callable[..., Forecast]


@pytest.fixture(scope="module")
def tiny(configs: dict[str, Path]) -> Make:
    """Forecasts of the tiny pretraining on a cluster."""

    def make(*overrides: str, ranks: int = 1, **cluster: Any) -> Forecast:
        return forecast("pretrain", configs["pretrain"], *overrides, ranks=ranks, **cluster)

    return make


def messages(made_forecast: Forecast, limits: JobLimits = NO_LIMITS, *slurm: Any) -> list[tuple[bool, str]]:
    found = find_problems(made_forecast, limits, *(slurm or (None, None)))
    return [(problem.fatal, problem.sentence) for problem in found]


def test_a_small_run_has_no_problems(tiny: Make) -> None:
    assert messages(tiny(gpu_flops_per_second=1e12, gpu_memory_bytes=80e9), JobLimits(3600, 180, "x")) == []


def test_a_memory_that_is_too_small_is_said_with_a_way_out(tiny: Make) -> None:
    context = tiny("engine.zero=1", ranks=2, gpu_memory_bytes=1.5e9)  # no room beside CUDA's context
    ((fatal, message),) = messages(context)
    assert fatal and message.startswith("memory: a GPU needs ")
    assert message.endswith("no sharding, recomputation or smaller batch.max_micro_size makes it fit")
    small = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    large = ("batch.global_size=1024", "batch.max_micro_size=1024", "data.image_size=64", small)
    ((fatal, message),) = messages(tiny(*large, gpu_memory_bytes=2.0e9))
    remedy = message.rpartition("; set ")[2].split()
    assert fatal and remedy
    assert messages(tiny(*large, *remedy, gpu_memory_bytes=2.0e9)) == []


def test_times_that_do_not_fit(tiny: Make) -> None:
    slow = tiny("checkpoint.every=5", gpu_flops_per_second=tiny().global_flops_per_step / 0.4 / 100)  # 100 s per step
    assert slow.step_seconds == pytest.approx(100)
    assert slow.all_runs_training_seconds == pytest.approx(2200)
    limits = JobLimits(600, 60, "the script")  # 360 s between start and notice
    ((fatal, message),) = messages(slow, limits)
    assert fatal and "ends before its first checkpoint" in message and "checkpoint.every=1" not in message[:40]
    assert count_attempts(slow, limits) == 7
    assert count_attempts(slow, JobLimits(240, 60, "x")) is None
    short = messages(slow, JobLimits(300, 60, "x"))
    assert any("is too short for a step of 100 s" in message for _, message in short)


def test_a_notice_shorter_than_a_save(tiny: Make) -> None:
    slow_disk = tiny(write_bytes_per_second=1e4)
    ((fatal, message),) = messages(slow_disk, JobLimits(None, 10, "slurm/pretrain_mae.sh"))
    assert fatal and message.startswith(
        "notice: slurm/pretrain_mae.sh requests a signal 10 s before the end, a checkpoint takes "
    )
    assert message.endswith(f"--signal=USR1@{-(-2 * slow_disk.checkpoint_bytes // 10_000)}")


def test_partitions_that_do_not_fit(tiny: Make) -> None:
    three_nodes = replace(tiny(write_bytes_per_second=1e4), cluster=ClusterSpec(3, 1, 0.4, 1e4))
    partition = SlurmPartition("short", 3600, None, 5, 2)
    limits, request = JobLimits(3600, None, "partition short"), JobScriptTimes("slurm/x.sh", 86400, None)
    problems = messages(three_nodes, limits, partition, request)
    assert [fatal for fatal, _ in problems] == [True, False, False]
    assert [message.partition(":")[0] for _, message in problems] == ["nodes", "time", "preemption"]
    assert "--time=60" in problems[1][1]


def test_timeouts_and_disks_that_do_not_fit(tiny: Make) -> None:
    flops_per_second = tiny().global_flops_per_step / 0.4 / 100
    slow = tiny("engine.timeout_minutes=1", "data.stall_timeout_seconds=5", gpu_flops_per_second=flops_per_second)
    assert [(fatal, message[:7]) for fatal, message in messages(slow)] == [(True, "timeout")]
    quick = tiny(
        "checkpoint.every=1", "checkpoint.max_gigabytes=0.000001", gpu_flops_per_second=1e18, write_bytes_per_second=1e4
    )
    assert [message.partition(":")[0] for _, message in messages(quick)] == ["checkpoints", "checkpoints"]


def test_labels_that_many_ranks_read_from_many_shards(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_MAX_INDEX_OPENS", 3)
    assert messages(tiny(ranks=4)) == [], "masked images have no use for labels"
    ((fatal, said),) = messages(tiny("data.balance=1", ranks=4))
    assert not fatal and re.match(r"files: each of 4 ranks reads \d+ indices of shards .* at every start, \d+ to", said)


def test_traffic_by_hand(tiny: Make) -> None:
    two_ranks = tiny(ranks=2)
    weights = 4 * two_ranks.parameter_counts.trainable
    zeros = {0: weights, 1: 1.5 * weights, 2: 1.5 * weights, 3: weights}
    assert two_ranks.network_bytes_by_sharding == {
        f"ZeRO {stage}": pytest.approx(sent) for stage, sent in zeros.items()
    }


# --- the command ---


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_prints_a_plan(configs: dict[str, Path]) -> None:
    result = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpus-per-node", "2", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    heads = [line[:10].strip() for line in result.output.splitlines() if line[:1] != " "]
    assert {"steps", "lr", "batch", "model", "work", "memory", "disk", "network", "time", "loading"} <= set(heads)
    assert "ZeRO 3" in result.output


def test_the_plan_of_a_run_has_the_rules_that_it_began_with(
    configs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "science.json").write_text('{"seed": 0}')
    versions: list[int] = []

    def build_plan(cfg: Any, world_size: int) -> None:
        versions.append(cfg.data.decode_version)
        raise ConfigError("seen")

    stage = replace(stage_named("pretrain"), import_functions=lambda: SimpleNamespace(build_plan=build_plan))
    monkeypatch.setattr(forecast_cli, "import_stage", lambda _: stage)
    for run_dir in (tmp_path, tmp_path / "new"):
        run(str(configs["pretrain"]), f"run.dir={run_dir}", "--stage", "pretrain")
    assert versions == [1, 2]


def test_the_command_speaks_json(configs: dict[str, Path]) -> None:
    result = run(str(configs["finetune"]), "--stage", "finetune", "--json")
    tree = json.loads(result.output)
    assert tree["runs"] == 1 and tree["steps"] == 22 and tree["step_seconds"] is None
    assert set(tree["memory"]) == {"DDP", "FSDP2"}
    assert tree["memory"]["DDP"]["bf16, recompute"]["peak"] > 0


def test_a_plan_that_cannot_be_is_exit_code_2(configs: dict[str, Path]) -> None:
    result = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpu-memory", "1")
    assert result.exit_code == 2
    assert "cannot    memory: a GPU needs" in result.output
    result = run(str(configs["pretrain"]), "--stage", "pretrain", "--gpus-per-node", "3")
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2
    assert "64" in str(result.exception)


def test_a_time_is_a_range_from_the_measured_rate_to_the_hoped_one(tiny: Make) -> None:
    measured, stated = (tiny(gpu_flops_per_second=1e9, **mfu_range(mfu, "bf16")) for mfu in (None, 0.4))
    assert measured.step_seconds is not None and measured.hoped_speedup is not None
    assert measured.step_seconds / measured.hoped_speedup == pytest.approx(stated.step_seconds)
    first, second, *notes = _time_lines(measured, NO_LIMITS, None)
    assert "at 6.5 % of 0 TFLOP/s" in first and "at 40 %, hoped for" in second
    assert "was measured: ViT-B/16" in notes[0]
    assert len(_time_lines(stated, NO_LIMITS, None)) == 2
    assert "in fp32 nothing was measured" in mfu_range(None, "fp32")["mfu_notes"][-1]


def test_a_plan_without_data_at_hand(configs: dict[str, Path], tmp_path: Path) -> None:
    away = ("data.path=/nowhere", f"run.dir={tmp_path / 'run'}", "init=null")
    model = "model={name: vit_tiny_patch16_224, patch: 4, width: 32, depth: 2, heads: 2}"
    words = (str(configs["finetune"]), *away, model, "--stage", "finetune", "--peak-tflops", "1")
    result = run(*words, "--images", "25001", "--classes", "3")
    assert result.exit_code == 0, result.output
    assert "data      not read: 25,001 images in 3 classes in train, as --images says" in result.output
    assert f"steps     {25001 // 64} = 1 epoch x" in result.output
    assert "bytes unknown without --bytes-per-image" in result.output and "foveal-stated" not in result.output
    assert "at 6.5 % of 1 TFLOP/s" in result.output
    assert "do not suffice" in (said := str(run(*words, "--images", "25001").exception))
    assert "/nowhere: its samples have no classes to learn" in said
    assert "give --images as well" in str(run(*words, "--classes", "3").exception)


def test_the_stage_is_seen_from_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert resolve_stage_name("configs/distill/mae_vit_s16.yaml", None) == "distill"
    assert resolve_stage_name("mae_vit_b16", None) == "pretrain"
    with pytest.raises(ConfigError, match="give --stage"):
        resolve_stage_name("digits", None)  # three stages have one
    with pytest.raises(ConfigError, match="--stage train does not exist"):
        resolve_stage_name("digits", "train")
    with pytest.raises(ConfigError, match=r"Did you mean .imagenette."):
        resolve_stage_name("imagenete", None)


def test_the_stage_is_seen_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text((SHIPPED_CONFIGS / "pretrain" / "digits_image.yaml").read_text())
    assert resolve_stage_name(str(tmp_path / "mine.yaml"), None) == "pretrain"


def test_gpus_have_names() -> None:
    h100 = find_gpu_spec("H100")
    assert h100.peak_tflops(EngineConfig(precision="bf16")) == 989
    assert h100.peak_tflops(EngineConfig()) == 67
    assert h100.peak_tflops(EngineConfig(float32_matmul_precision="high")) == 494
    with pytest.raises(ConfigError, match="--gpu k80 is not known"):
        find_gpu_spec("k80")
