"""A forecast as text, and as data for JSON."""

from dataclasses import asdict
from typing import Any

from foveal.engines.compiling import choose_compiled_parts
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.forecast.memory import CUDA_CONTEXT_BYTES, FRAGMENTATION_FACTOR
from foveal.forecast.problems import STARTUP_SECONDS, JobLimits, Problem, count_attempts
from foveal.forecast.replication import find_replication
from foveal.slurm import SlurmPartition

_LAUNCH_BOUND_MS = 20.0  # of a forward and backward in some hundred kernels, each launched from Python; assumed


def format_forecast(forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None) -> list[str]:
    """Return the lines of the plan and of the forecast."""
    return [
        *_plan_lines(forecast),
        *_model_lines(forecast),
        *_memory_lines(forecast),
        *_disk_and_network_lines(forecast),
        *_time_lines(forecast, limits, partition),
    ]


def forecast_to_dict(
    forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None, problems: list[Problem]
) -> dict[str, Any]:
    """Return every number, in seconds, bytes and FLOPs."""
    plan = forecast.plan
    loader, replication = forecast.loader_memory, find_replication(forecast)
    memory = {
        sharding: {variant: asdict(estimate) | {"needed": estimate.required_bytes} for variant, estimate in row.items()}
        for sharding, row in forecast.memory_by_sharding.items()
    }
    return {
        "stage": forecast.stage.name,
        "ranks": plan.world_size,
        "steps": plan.total_steps,
        "runs": plan.num_runs,
        "epochs": plan.cfg.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "images": plan.cfg.batch.global_size,
        "at_once": plan.microbatch_size,
        "micros": plan.accumulation_steps,
        "lanes": plan.cfg.data.lanes,
        "lr": plan.cfg.optim.peak_lr(plan.cfg.batch.global_size),
        "parameters": forecast.parameter_counts.trainable,
        "flops_per_image": {
            "forward": forecast.flops_per_sample.forward,
            "forward_and_backward": forecast.flops_per_sample.forward_backward,
        },
        "flops_per_step": forecast.global_flops_per_step,
        "memory": memory,
        "chosen": {"sharing": forecast.selected_sharding, "way": forecast.selected_variant},
        "gpu_bytes": forecast.cluster.gpu_memory_bytes,
        "checkpoint_bytes": forecast.checkpoint_bytes,
        "save_seconds": forecast.seconds_per_save,
        "pinned_checkpoint_bytes": forecast.pinned_checkpoint_bytes,
        "loader_memory": None if loader is None else asdict(loader),
        "network_bytes_per_step": forecast.network_bytes_by_sharding,
        "replication": None if replication is None else asdict(replication),
        "step_seconds": forecast.step_seconds,
        "seconds": forecast.all_runs_training_seconds,
        "mfu": forecast.cluster.mfu,
        "hoped_mfu": forecast.cluster.hoped_mfu,
        "images_per_second_per_rank": forecast.images_per_second_per_rank,
        "partition": None if partition is None else asdict(partition),
        "limits": asdict(limits),
        "attempts": count_attempts(forecast, limits),
        "problems": [asdict(problem) for problem in problems],
    }


def _plan_lines(forecast: Forecast) -> list[str]:
    """Return the lines of the plan, without what only data can tell."""
    lines, stated = forecast.plan.summary_lines(), forecast.stated_data
    if stated is None:
        return lines
    classes = "" if stated.classes is None else f" in {stated.classes:,} classes"
    return [
        f"data      not read: {stated.images:,} images{classes} in {forecast.plan.cfg.data.train}, as --images says",
        *(line for line in lines if not line.startswith(("data ", "decoder ", "labels ", "evaluate "))),
    ]


def _model_lines(forecast: Forecast) -> list[str]:
    flops, parameters = forecast.flops_per_sample, forecast.parameter_counts
    frozen = f", {parameters.frozen_bytes / 1e6:.1f} MB frozen" if parameters.frozen_bytes else ""
    return [
        f"model     {parameters.trainable:,} trained parameters{frozen}",
        (
            f"work      {flops.forward_backward / 1e9:.4g} GFLOP per image ({flops.forward / 1e9:.4g} forward), "
            f"{forecast.global_flops_per_step / 1e12:.4g} TFLOP per step, without recomputation"
        ),
    ]


def _memory_lines(forecast: Forecast) -> list[str]:
    limit, estimate = forecast.cluster.gpu_memory_bytes, forecast.memory_estimate
    variants = list(next(iter(forecast.memory_by_sharding.values())))
    lines = [f"memory    peak per GPU in GB{'':8}" + "".join(f"{variant:>18}" for variant in variants)]
    for sharding, row in forecast.memory_by_sharding.items():
        cells = ""
        for variant, option in row.items():
            selected = "*" if (sharding, variant) == (forecast.selected_sharding, forecast.selected_variant) else ""
            too_large = "!" if limit is not None and option.required_bytes > limit else ""
            cells += f"{too_large}{selected}{option.peak / 1e9:.2f}".rjust(18)
        lines.append(f"{'':10}{sharding:26}{cells}")
    lines.append(
        f"{'':10}* this config: {estimate.weights / 1e9:.2f} weights, {estimate.moments / 1e9:.2f} moments, "
        f"{estimate.gradients / 1e9:.2f} gradients, {estimate.buffers / 1e9:.2f} buffers, {estimate.micro / 1e9:.2f} "
        f"microbatch" + (f"; ! more than {limit / 1e9:.0f} GB" if limit is not None else "")
    )
    lines.append(
        f"{'':10}a GPU needs {estimate.required_bytes / 1e9:.1f} GB: {FRAGMENTATION_FACTOR:g} times the peak for "
        f"fragmentation, and {CUDA_CONTEXT_BYTES / 1e9:g} GB for CUDA and NCCL (both assumed)"
    )
    if choose_compiled_parts(forecast.plan.cfg.engine, "cuda"):
        lines.append(f"{'':10}engine.compile is not modelled and usually needs less")
    if "offload_optimizer" in forecast.plan.cfg.engine.deepspeed.get("zero_optimization", {}):
        lines.append(f"{'':10}offloading is not modelled: master weights and moments are counted on the GPU")
    return lines


def _disk_and_network_lines(forecast: Forecast) -> list[str]:
    size, cfg = forecast.checkpoint_bytes, forecast.plan.cfg.checkpoint
    traffic = ", ".join(f"{name} {sent / 1e9:.3g}" for name, sent in forecast.network_bytes_by_sharding.items())
    return [
        (
            f"disk      {size / 1e9:.3g} GB per checkpoint in {forecast.plan.world_size} files, {cfg.keep} kept"
            f"{f' and one per {cfg.keep_every} steps' if cfg.keep_every else ''}; {forecast.seconds_per_save:.0f} s at "
            f"{forecast.cluster.write_bytes_per_second / 1e9:.3g} GB/s"
        ),
        f"host      {forecast.pinned_checkpoint_bytes / 1e9:.3g} GB of a node's memory pinned for the copy of a checkpoint",
        *_loader_memory_lines(forecast),
        f"network   GB sent per GPU and step: {traffic}",
        *_replication_lines(forecast),
    ]


def _loader_memory_lines(forecast: Forecast) -> list[str]:
    """Return a line about the processes that decode, if there are any."""
    memory, setting = forecast.loader_memory, forecast.plan.cfg.data.workers
    if memory is None:
        return []
    at_most = "up to " if setting == "auto" else ""
    shared, private = memory.slab_bytes / 1e9, memory.process_bytes / 1e9
    workers = f"{forecast.cluster.gpus_per_node} x {at_most}{memory.workers_per_rank}"
    line = (
        f"{shared:.3g} GB pinned for images that are read ahead; {at_most}{private:.3g} GB of {workers} processes that"
    )
    return [f"{'':10}{line} decode (data.workers={setting})"]


def _replication_lines(forecast: Forecast) -> list[str]:
    """Return a line about the engine that is faster because everything fits on every GPU, if there is one."""
    faster, limit = find_replication(forecast), forecast.cluster.gpu_memory_bytes
    if faster is None or limit is None:
        return []
    reason, gain = (
        "everything fits without sharding",
        f"{faster.sent_bytes / 1e9:.3g} GB sent in place of {faster.configured_sent_bytes / 1e9:.3g}",
    )
    if forecast.plan.world_size == 1:
        reason, gain = "one GPU shards nothing", "fewer operations per step (benchmarks/results/host.md)"
    room = f"{faster.required_bytes / 1e9:.1f} of {limit / 1e9:.0f} GB"
    return [f"{'':10}faster: {faster.settings}, because {reason} ({room}): {gain}"]


def _time_line(head: str, hours: float, steps: str, utilisation: str, cluster: ClusterSpec) -> str:
    return f"{head:10}{hours:.3g} hours ({steps}) at {utilisation}: {hours * cluster.world_size:.3g} GPU-hours"


def _loading_line(forecast: Forecast, images_per_second: float) -> str:
    """Return the line about the images that a rank must decode: at the range's fast end, which asks for most."""
    cluster, workers = forecast.cluster, forecast.plan.cfg.data.workers
    rate = images_per_second * (forecast.hoped_speedup or 1)
    node_rate, size = rate * cluster.gpus_per_node, forecast.mean_stored_sample_bytes
    read = "bytes unknown without --bytes-per-image" if size is None else f"{node_rate * size / 1e6:,.0f} MB/s"
    span = f"{images_per_second:,.0f} to " if forecast.hoped_speedup else ""
    if workers == "auto":
        share = "by a process for each core of the rank but one (data.workers=auto)"
    else:
        processes = max(1, workers)  # without workers the rank itself decodes
        share = f"{rate / processes:,.0f} per process with data.workers={workers}"
    return f"loading   {span}{rate:,.0f} images/s per rank to decode, {share}, {node_rate:,.0f} per node ({read})"


def _time_lines(forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None) -> list[str]:
    seconds, step, rate = forecast.all_runs_training_seconds, forecast.step_seconds, forecast.images_per_second_per_rank
    if seconds is None or step is None or rate is None:
        return ["time      unknown: give --gpu, or --peak-tflops"]
    cluster, plan = forecast.cluster, forecast.plan
    runs = f"{plan.num_runs} runs, " if plan.num_runs > 1 else ""
    assert cluster.gpu_flops_per_second is not None
    hours, peak = seconds / 3600, f"{cluster.gpu_flops_per_second / 1e12:.0f} TFLOP/s"
    lines = [_time_line("time", hours, f"{runs}{step:.3g} s per step", f"{100 * cluster.mfu:.2g} % of {peak}", cluster)]
    if (speedup := forecast.hoped_speedup) is not None:
        hoped = f"{100 * cluster.mfu * speedup:.2g} %, hoped for"
        lines.append(_time_line("", hours / speedup, f"{step / speedup:.3g} s per step", hoped, cluster))
    lines += [f"{'':10}{note}" for note in cluster.mfu_notes]
    if (microbatch_ms := 1e3 * step / plan.accumulation_steps) < _LAUNCH_BOUND_MS:
        lines.append(
            f"{'':10}beware: {microbatch_ms:.2g} ms per microbatch is less than its kernels take to launch: expect more"
        )
    lines.append(_loading_line(forecast, rate))
    attempts = count_attempts(forecast, limits)
    if attempts is not None and limits.time is not None:
        lines.append(
            f"slurm     {attempts - 1} requeues: jobs of {limits.time / 3600:.3g} hours ({limits.whose}), of which "
            f"{(STARTUP_SECONDS + (limits.notice or 0)) / 60:.0f} min are start-up and saving"
        )
    if partition is not None and partition.grace:
        lines.append(f"{'':10}partition {partition.name} gives preempted jobs {partition.grace:.0f} s of grace")
    return lines
