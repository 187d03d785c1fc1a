"""A forecast in words, and as a tree for machines."""

from dataclasses import asdict
from typing import Any

from foveal.forecast.forecast import Forecast
from foveal.forecast.memory import CUDA_CONTEXT_BYTES, FRAGMENTATION_FACTOR
from foveal.forecast.problems import STARTUP_SECONDS, JobLimits, Problem, count_attempts
from foveal.forecast.slurm_limits import SlurmPartition


def format_forecast(forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None) -> list[str]:
    """The plan, line by line, and the table of memory."""
    return [
        *forecast.plan.summary_lines(),
        *_model_lines(forecast),
        *_memory_lines(forecast),
        *_disk_and_network_lines(forecast),
        *_time_lines(forecast, limits, partition),
    ]


def forecast_to_dict(
    forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None, problems: list[Problem]
) -> dict[str, Any]:
    """Every number, in seconds, bytes and operations."""
    plan = forecast.plan
    memory = {
        name: {way: asdict(each) | {"needed": each.required_bytes} for way, each in row.items()}
        for name, row in forecast.memory_by_sharding.items()
    }
    return {
        "stage": forecast.stage.name,
        "ranks": plan.world_size,
        "steps": plan.total_steps,
        "runs": plan.num_runs,
        "epochs": plan.cfg.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "images": plan.cfg.batch.images,
        "at_once": plan.microbatch_size,
        "micros": plan.accumulation_steps,
        "lanes": plan.cfg.data.lanes,
        "lr": plan.cfg.optim.peak_lr(plan.cfg.batch.images),
        "parameters": forecast.parameter_counts.trainable,
        "flops_per_image": {
            "forward": forecast.flops_per_sample.forward,
            "forward_and_backward": forecast.flops_per_sample.forward_backward,
        },
        "flops_per_step": forecast.flops_per_step,
        "memory": memory,
        "chosen": {"sharing": forecast.selected_sharding, "way": forecast.selected_variant},
        "gpu_bytes": forecast.cluster.gpu_memory_bytes,
        "checkpoint_bytes": forecast.checkpoint_bytes,
        "save_seconds": forecast.save_seconds,
        "network_bytes_per_step": forecast.network_bytes_by_sharding,
        "step_seconds": forecast.step_seconds,
        "seconds": forecast.total_seconds,
        "images_per_second_per_rank": forecast.images_per_second_per_rank,
        "partition": None if partition is None else asdict(partition),
        "limits": asdict(limits),
        "attempts": count_attempts(forecast, limits),
        "problems": [asdict(problem) for problem in problems],
    }


def _model_lines(forecast: Forecast) -> list[str]:
    flops, weights = forecast.flops_per_sample, forecast.parameter_counts
    frozen = f", and {weights.frozen_bytes / 1e6:.1f} MB that are not trained" if weights.frozen_bytes else ""
    data = forecast.plan.cfg.data
    return [
        f"order     {data.lanes} lanes, each shuffled within {data.window} shards, whatever the ranks",
        f"model     {weights.trainable:,} trained parameters{frozen}",
        (
            f"work      {flops.forward_backward / 1e9:.4g} GFLOP an image ({flops.forward / 1e9:.4g} forward), "
            f"{forecast.flops_per_step / 1e12:.4g} TFLOP a step; recomputation not counted"
        ),
    ]


def _memory_lines(forecast: Forecast) -> list[str]:
    limit, mine = forecast.cluster.gpu_memory_bytes, forecast.memory_estimate
    ways = list(next(iter(forecast.memory_by_sharding.values())))
    lines = [f"memory    GB a GPU at its peak{'':6}" + "".join(f"{way:>18}" for way in ways)]
    for name, row in forecast.memory_by_sharding.items():
        cells = ""
        for way, each in row.items():
            chosen = "*" if (name, way) == (forecast.selected_sharding, forecast.selected_variant) else ""
            fits = "!" if limit is not None and each.required_bytes > limit else ""
            cells += f"{fits}{chosen}{each.peak / 1e9:.2f}".rjust(18)
        lines.append(f"{'':10}{name:26}{cells}")
    lines.append(
        f"{'':10}* this config: {mine.weights / 1e9:.2f} weights, {mine.moments / 1e9:.2f} moments, "
        f"{mine.gradients / 1e9:.2f} gradients, {mine.buffers / 1e9:.2f} buffers, {mine.micro / 1e9:.2f} for a micro"
        + (f"; ! more than {limit / 1e9:.0f} GB" if limit is not None else "")
    )
    lines.append(
        f"{'':10}a GPU must have {mine.required_bytes / 1e9:.1f} GB: {FRAGMENTATION_FACTOR:g} times the peak for fragmentation, and "
        f"{CUDA_CONTEXT_BYTES / 1e9:g} GB for CUDA and NCCL (both assumed)"
    )
    if forecast.plan.cfg.engine.compile:
        lines.append(f"{'':10}engine.compile usually needs less: it is not modelled")
    if "offload_optimizer" in forecast.plan.cfg.engine.deepspeed.get("zero_optimization", {}):
        lines.append(f"{'':10}offloading is not modelled: masters and moments are counted on the GPU")
    return lines


def _disk_and_network_lines(forecast: Forecast) -> list[str]:
    size, cfg = forecast.checkpoint_bytes, forecast.plan.cfg.checkpoint
    ways = ", ".join(f"{name} {sent / 1e9:.3g}" for name, sent in forecast.network_bytes_by_sharding.items())
    return [
        (
            f"disk      {size / 1e9:.3g} GB a checkpoint in {forecast.plan.world_size} files, {cfg.keep} kept"
            f"{f' and one in {cfg.keep_every} steps' if cfg.keep_every else ''}; {forecast.save_seconds:.0f} s at "
            f"{forecast.cluster.write_bytes_per_second / 1e9:.3g} GB/s"
        ),
        f"network   GB that a GPU sends in a step: {ways}",
    ]


def _time_lines(forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None) -> list[str]:
    seconds, step, pace = forecast.total_seconds, forecast.step_seconds, forecast.images_per_second_per_rank
    if seconds is None or step is None or pace is None:
        return ["time      unknown: give --gpu, or --peak-tflops"]
    machine, plan = forecast.cluster, forecast.plan
    runs = f"{plan.num_runs} runs, " if plan.num_runs > 1 else ""
    assert machine.peak_flops_per_second is not None
    lines = [
        (
            f"time      {seconds / 3600:.3g} hours ({runs}{step:.3g} s a step) if {machine.mfu:.0%} of "
            f"{machine.peak_flops_per_second / 1e12:.0f} TFLOP/s is reached: {seconds / 3600 * machine.world_size:.3g} GPU-hours"
        ),
        (
            f"loading   {pace:,.0f} images/s a rank to decode, {pace / plan.cfg.data.threads:,.0f} for each of data.threads="
            f"{plan.cfg.data.threads}, {pace * machine.gpus_per_node:,.0f} a node ({pace * machine.gpus_per_node * forecast.mean_image_bytes / 1e6:,.0f} MB/s)"
        ),
    ]
    attempts = count_attempts(forecast, limits)
    if attempts is not None and limits.time is not None:
        lines.append(
            f"slurm     {attempts - 1} requeues: jobs of {limits.time / 3600:.3g} hours ({limits.whose}), of which "
            f"{(STARTUP_SECONDS + (limits.notice or 0)) / 60:.0f} min go into starting and saving"
        )
    if partition is not None and partition.grace:
        lines.append(f"{'':10}partition {partition.name} gives a preempted job {partition.grace:.0f} s")
    return lines
