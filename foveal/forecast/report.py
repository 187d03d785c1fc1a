"""A forecast in words, and as a tree for machines."""

from dataclasses import asdict
from typing import Any

from foveal.forecast.forecast import Forecast
from foveal.forecast.memory import CONTEXT_BYTES, FRAGMENTED
from foveal.forecast.problems import STARTING, Limits, Problem, attempts_of
from foveal.forecast.slurm_limits import Partition


def lines_of(forecast: Forecast, limits: Limits, partition: Partition | None) -> list[str]:
    """The plan, line by line, and the table of memory."""
    return [
        *forecast.plan.lines(),
        *_model(forecast),
        *_memory(forecast),
        *_disk_and_network(forecast),
        *_time(forecast, limits, partition),
    ]


def tree_of(forecast: Forecast, limits: Limits, partition: Partition | None, problems: list[Problem]) -> dict[str, Any]:
    """Every number, in seconds, bytes and operations."""
    plan = forecast.plan
    memory = {
        name: {way: asdict(each) | {"needed": each.needed} for way, each in row.items()}
        for name, row in forecast.choices.items()
    }
    return {
        "stage": forecast.stage.name,
        "ranks": plan.ranks,
        "steps": plan.steps,
        "runs": plan.runs,
        "epochs": plan.cfg.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "images": plan.cfg.batch.images,
        "at_once": plan.at_once,
        "micros": plan.micros,
        "lanes": plan.cfg.data.lanes,
        "lr": plan.cfg.optim.peak(plan.cfg.batch.images),
        "parameters": forecast.weights.trained,
        "flops_per_image": {"forward": forecast.flops.forward, "forward_and_backward": forecast.flops.both},
        "flops_per_step": forecast.step_flops,
        "memory": memory,
        "chosen": {"sharing": forecast.sharing, "way": forecast.way},
        "gpu_bytes": forecast.machine.memory,
        "checkpoint_bytes": forecast.checkpoint_bytes,
        "save_seconds": forecast.save_seconds,
        "network_bytes_per_step": forecast.traffics,
        "step_seconds": forecast.step_seconds,
        "seconds": forecast.seconds,
        "images_per_second_per_rank": forecast.images_per_second,
        "partition": None if partition is None else asdict(partition),
        "limits": asdict(limits),
        "attempts": attempts_of(forecast, limits),
        "problems": [asdict(problem) for problem in problems],
    }


def _model(forecast: Forecast) -> list[str]:
    flops, weights = forecast.flops, forecast.weights
    frozen = f", and {weights.frozen_bytes / 1e6:.1f} MB that are not trained" if weights.frozen_bytes else ""
    data = forecast.plan.cfg.data
    return [
        f"order     {data.lanes} lanes, each shuffled within {data.window} shards, whatever the ranks",
        f"model     {weights.trained:,} trained parameters{frozen}",
        (
            f"work      {flops.both / 1e9:.4g} GFLOP an image ({flops.forward / 1e9:.4g} forward), "
            f"{forecast.step_flops / 1e12:.4g} TFLOP a step; recomputation not counted"
        ),
    ]


def _memory(forecast: Forecast) -> list[str]:
    limit, mine = forecast.machine.memory, forecast.memory
    ways = list(next(iter(forecast.choices.values())))
    lines = [f"memory    GB a GPU at its peak{'':6}" + "".join(f"{way:>18}" for way in ways)]
    for name, row in forecast.choices.items():
        cells = ""
        for way, each in row.items():
            chosen = "*" if (name, way) == (forecast.sharing, forecast.way) else ""
            fits = "!" if limit is not None and each.needed > limit else ""
            cells += f"{fits}{chosen}{each.peak / 1e9:.2f}".rjust(18)
        lines.append(f"{'':10}{name:26}{cells}")
    lines.append(
        f"{'':10}* this config: {mine.weights / 1e9:.2f} weights, {mine.moments / 1e9:.2f} moments, "
        f"{mine.gradients / 1e9:.2f} gradients, {mine.buffers / 1e9:.2f} buffers, {mine.micro / 1e9:.2f} for a micro"
        + (f"; ! more than {limit / 1e9:.0f} GB" if limit is not None else "")
    )
    lines.append(
        f"{'':10}a GPU must have {mine.needed / 1e9:.1f} GB: {FRAGMENTED:g} times the peak for fragmentation, and "
        f"{CONTEXT_BYTES / 1e9:g} GB for CUDA and NCCL (both assumed)"
    )
    if forecast.plan.cfg.engine.compile:
        lines.append(f"{'':10}engine.compile usually needs less: it is not modelled")
    if "offload_optimizer" in forecast.plan.cfg.engine.deepspeed.get("zero_optimization", {}):
        lines.append(f"{'':10}offloading is not modelled: masters and moments are counted on the GPU")
    return lines


def _disk_and_network(forecast: Forecast) -> list[str]:
    size, cfg = forecast.checkpoint_bytes, forecast.plan.cfg.checkpoint
    ways = ", ".join(f"{name} {sent / 1e9:.3g}" for name, sent in forecast.traffics.items())
    return [
        (
            f"disk      {size / 1e9:.3g} GB a checkpoint in {forecast.plan.ranks} files, {cfg.keep} kept"
            f"{f' and one in {cfg.keep_every} steps' if cfg.keep_every else ''}; {forecast.save_seconds:.0f} s at "
            f"{forecast.machine.write_bytes / 1e9:.3g} GB/s"
        ),
        f"network   GB that a GPU sends in a step: {ways}",
    ]


def _time(forecast: Forecast, limits: Limits, partition: Partition | None) -> list[str]:
    seconds, step, pace = forecast.seconds, forecast.step_seconds, forecast.images_per_second
    if seconds is None or step is None or pace is None:
        return ["time      unknown: give --gpu, or --peak-tflops"]
    machine, plan = forecast.machine, forecast.plan
    runs = f"{plan.runs} runs, " if plan.runs > 1 else ""
    assert machine.rate is not None
    lines = [
        (
            f"time      {seconds / 3600:.3g} hours ({runs}{step:.3g} s a step) if {machine.mfu:.0%} of "
            f"{machine.rate / 1e12:.0f} TFLOP/s is reached: {seconds / 3600 * machine.ranks:.3g} GPU-hours"
        ),
        (
            f"loading   {pace:,.0f} images/s a rank to decode, {pace / plan.cfg.data.threads:,.0f} for each of data.threads="
            f"{plan.cfg.data.threads}, {pace * machine.gpus:,.0f} a node ({pace * machine.gpus * forecast.image_bytes / 1e6:,.0f} MB/s)"
        ),
    ]
    attempts = attempts_of(forecast, limits)
    if attempts is not None and limits.time is not None:
        lines.append(
            f"slurm     {attempts - 1} requeues: jobs of {limits.time / 3600:.3g} hours ({limits.whose}), of which "
            f"{(STARTING + (limits.notice or 0)) / 60:.0f} min go into starting and saving"
        )
    if partition is not None and partition.grace:
        lines.append(f"{'':10}partition {partition.name} gives a preempted job {partition.grace:.0f} s")
    return lines
