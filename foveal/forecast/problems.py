"""Problems of a plan on a cluster, each a message with the reason and the remedy."""

import math
from dataclasses import dataclass

from foveal.forecast.forecast import Forecast, engine_overrides_by_sharding
from foveal.forecast.slurm_limits import JobScriptTimes
from foveal.slurm import SlurmPartition

# From the start of a job to its first step: containers, imports, index, checkpoint; assumed.
STARTUP_SECONDS = 180.0
_MAX_INDEX_OPENS = 1_000_000  # of all ranks at a start: minutes for a metadata server of 10,000 opens per second


@dataclass(frozen=True, slots=True)
class Problem:
    """A message, and whether the run cannot work at all."""

    fatal: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Seconds of a job, and of the notice before its end; None if unknown. ``whose`` names the source of the limit."""

    time: float | None
    notice: float | None
    whose: str


def find_problems(
    forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None, request: JobScriptTimes | None
) -> list[Problem]:
    """Return all problems, fatal ones first."""
    problems = [
        *_memory_problems(forecast),
        *_partition_problems(forecast, partition, request),
        *_time_problems(forecast, limits),
        *_disk_problems(forecast),
        *_timeout_problems(forecast),
        *_save_interval_problems(forecast),
        *_file_problems(forecast),
    ]
    return sorted(problems, key=lambda problem: not problem.fatal)


def count_attempts(forecast: Forecast, limits: JobLimits) -> int | None:
    """Return the number of jobs needed; None if it is unknown, or if a job is too short for any step."""
    seconds, limit = forecast.all_runs_training_seconds, limits.time
    if seconds is None or limit is None:
        return None
    useful = limit - STARTUP_SECONDS - (limits.notice or 0.0)
    return math.ceil(seconds / useful) if useful > 0 else None


def _memory_problems(forecast: Forecast) -> list[Problem]:
    limit, needed = forecast.cluster.gpu_memory_bytes, forecast.memory_estimate.required_bytes
    if limit is None or needed <= limit:
        return []
    settings = _find_fitting_settings(forecast, limit)
    remedy = (
        f"set {settings}" if settings else "no sharding, recomputation or smaller batch.max_micro_size makes it fit"
    )
    return [Problem(True, f"memory: a GPU needs {needed / 1e9:.1f} GB and has {limit / 1e9:.0f}; {remedy}")]


def _find_fitting_settings(forecast: Forecast, limit: float) -> str | None:
    """Return the first settings that fit: more sharding, then smaller microbatches, then recomputation."""
    cfg, current_size = forecast.plan.cfg.engine, forecast.plan.microbatch_size
    options = engine_overrides_by_sharding(forecast.plan.cfg)
    shardings = list(options.values())[list(options).index(forecast.selected_sharding) :]  # less sharding needs more
    parameters = forecast.parameter_counts
    sizes = [n for n in range(current_size - 1, parameters.min_microbatch_size - 1, -1) if current_size % n == 0]
    for recompute in dict.fromkeys((cfg.activation_checkpointing, parameters.can_recompute)):
        for size in (current_size, *sizes):
            for sharding in shardings:
                candidate = cfg.model_copy(update={**sharding, "activation_checkpointing": recompute})
                if forecast.estimate_memory_with(candidate, size).required_bytes <= limit:
                    changes = [f"engine.{key}={value}" for key, value in sharding.items() if value != getattr(cfg, key)]
                    changes += [f"batch.max_micro_size={size}"] if size != current_size else []
                    changes += (
                        ["engine.activation_checkpointing=true"] if recompute != cfg.activation_checkpointing else []
                    )
                    return " ".join(changes)
    return None


def _partition_problems(
    forecast: Forecast, partition: SlurmPartition | None, request: JobScriptTimes | None
) -> list[Problem]:
    if partition is None:
        return []
    problems = []
    if forecast.cluster.nodes > partition.nodes:
        problems.append(
            Problem(
                True,
                f"nodes: partition {partition.name} allows {partition.nodes} per job, --nodes is "
                f"{forecast.cluster.nodes}; use fewer, or another --partition",
            )
        )
    if request and request.time_limit_seconds and partition.longest and request.time_limit_seconds > partition.longest:
        problems.append(
            Problem(
                False,
                f"time: {request.script} requests {_format_hours(request.time_limit_seconds)}, partition {partition.name} "
                f"allows {_format_hours(partition.longest)}, so the job would never start; give sbatch "
                f"--time={round(partition.longest // 60)}",
            )
        )
    if 0 < partition.grace < forecast.seconds_per_save:
        problems.append(
            Problem(
                False,
                f"preemption: partition {partition.name} gives {partition.grace:.0f} s of grace, a checkpoint of "
                f"{forecast.checkpoint_bytes / 1e9:.2f} GB takes {forecast.seconds_per_save:.0f} s: steps since the last "
                f"checkpoint are lost; lower checkpoint.every",
            )
        )
    return problems


def _time_problems(forecast: Forecast, limits: JobLimits) -> list[Problem]:
    problems = []
    save = forecast.seconds_per_save
    if limits.notice is not None and limits.notice < save:
        problems.append(
            Problem(
                True,
                f"notice: {limits.whose} requests a signal {limits.notice:.0f} s before the end, a checkpoint takes "
                f"{save:.0f} s at {forecast.cluster.write_bytes_per_second / 1e9:.3g} GB/s; use "
                f"--signal=USR1@{math.ceil(2 * save)}",
            )
        )
    step, every = forecast.step_seconds, forecast.plan.cfg.checkpoint.every
    if limits.time is None or step is None:
        return problems
    useful = limits.time - STARTUP_SECONDS - (limits.notice or 0.0)
    interval = step * every
    if useful < step:
        problems.append(
            Problem(
                True,
                f"time: a job of {_format_hours(limits.time)} is too short for a step of {step:.0f} s after start-up; "
                f"request more",
            )
        )
    elif every and interval > useful and forecast.plan.total_steps > every:
        problems.append(
            Problem(
                True,
                f"time: a job of {_format_hours(limits.time)} ends before its first checkpoint, which comes after "
                f"{_format_hours(interval)}: a node lost before that costs all steps; set checkpoint.every="
                f"{max(1, int(useful / step / 4))}",
            )
        )
    return problems


def _disk_problems(forecast: Forecast) -> list[Problem]:
    cfg, size = forecast.plan.cfg.checkpoint, forecast.checkpoint_bytes
    if cfg.max_gigabytes and 2 * size > cfg.max_gigabytes * 1e9:
        return [
            Problem(
                False,
                f"checkpoints: checkpoint.max_gigabytes={cfg.max_gigabytes:g} is less than two checkpoints of {size / 1e9:.2f} "
                f"GB: no older one is left if the newest is damaged; raise it",
            )
        ]
    return []


def _timeout_problems(forecast: Forecast) -> list[Problem]:
    limit, step = 60 * forecast.plan.cfg.engine.timeout_minutes, forecast.step_seconds
    if step is not None and step > limit / 2:
        return [
            Problem(
                step > limit,
                f"timeout: a step takes {step:.0f} s, and collectives time out after engine.timeout_minutes="
                f"{limit / 60:g}; raise it above {math.ceil(step / 30)}",
            )
        ]
    return []


def _save_interval_problems(forecast: Forecast) -> list[Problem]:
    step, every = forecast.step_seconds, forecast.plan.cfg.checkpoint.every
    if step is not None and every and step * every < forecast.seconds_per_save:
        return [
            Problem(
                False,
                f"checkpoints: {every} steps take {step * every:.0f} s and writing a checkpoint "
                f"{forecast.seconds_per_save:.0f} s: training would wait for the disk; raise checkpoint.every",
            )
        ]
    return []


def _format_hours(seconds: float) -> str:
    """Return H:MM:SS, as Slurm writes times."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}"


def _file_problems(forecast: Forecast) -> list[Problem]:
    """Say if the ranks together open very many index files at a start, as planning here has done once."""
    plan = forecast.plan
    opens = sum(source.dataset.num_index_reads for source in plan.training_set.sources)
    if opens * plan.world_size <= _MAX_INDEX_OPENS:
        return []
    return [
        Problem(
            False,
            f"files: each of {plan.world_size} ranks reads {opens:,} indices of shards for their labels at every start, "
            f"{opens * plan.world_size:,} together; pack the data into fewer, larger shards",
        )
    ]
