"""What will not do on a cluster, each in one sentence: what, why, and what to do."""

import math
from dataclasses import dataclass

from foveal.forecast.forecast import Forecast, sharding_options
from foveal.forecast.slurm_limits import JobScriptRequest, SlurmPartition

STARTUP_SECONDS = (
    180.0  # seconds from the start of a job to its first step: containers, imports, index, checkpoint; assumed
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A sentence, and whether the run cannot be."""

    fatal: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Seconds of a job, and of the notice before its end; nothing where it is not known. ``whose`` says who set them."""

    time: float | None
    notice: float | None
    whose: str


def find_problems(
    forecast: Forecast, limits: JobLimits, partition: SlurmPartition | None, request: JobScriptRequest | None
) -> list[Problem]:
    """All that will not do, the worst first."""
    found = [
        *_memory_problems(forecast),
        *_partition_problems(forecast, partition, request),
        *_time_problems(forecast, limits),
        *_disk_problems(forecast),
        *_timeout_problems(forecast),
        *_save_interval_problems(forecast),
    ]
    return sorted(found, key=lambda problem: not problem.fatal)


def count_attempts(forecast: Forecast, limits: JobLimits) -> int | None:
    """How many jobs of that length it takes; nothing where it is not known, or where none gets anywhere."""
    seconds, limit = forecast.total_seconds, limits.time
    if seconds is None or limit is None:
        return None
    useful = limit - STARTUP_SECONDS - (limits.notice or 0.0)
    return math.ceil(seconds / useful) if useful > 0 else None


def _memory_problems(forecast: Forecast) -> list[Problem]:
    limit, needed = forecast.cluster.gpu_memory_bytes, forecast.memory_estimate.required_bytes
    if limit is None or needed <= limit:
        return []
    way_out = _find_fitting_settings(forecast, limit)
    return [
        Problem(
            True,
            f"memory: a GPU needs {needed / 1e9:.1f} GB and has {limit / 1e9:.0f}; "
            + (f"set {way_out}" if way_out else "no sharing, recomputation or smaller batch.at_once makes it fit"),
        )
    ]


def _find_fitting_settings(forecast: Forecast, limit: float) -> str | None:
    """The settings that change least and fit: sharing first, which costs traffic, then fewer at once, then recomputation."""
    cfg, at_once = forecast.plan.cfg.engine, forecast.plan.microbatch_size
    ways = list(sharding_options(forecast.plan.cfg).values())
    ways = ways[
        list(sharding_options(forecast.plan.cfg)).index(forecast.selected_sharding) :
    ]  # what shares less than now needs more
    weights = forecast.parameter_counts
    for recompute in dict.fromkeys((cfg.recompute, weights.can_recompute)):
        for samples in (at_once, *(n for n in range(at_once - 1, weights.min_batch_size - 1, -1) if at_once % n == 0)):
            for way in ways:
                other = cfg.model_copy(update={**way, "recompute": recompute})
                if forecast.estimate_memory_with(other, samples).required_bytes <= limit:
                    changes = {f"engine.{name}={value}": value != getattr(cfg, name) for name, value in way.items()}
                    changes |= {
                        f"batch.at_once={samples}": samples != at_once,
                        "engine.recompute=true": recompute != cfg.recompute,
                    }
                    return " ".join(change for change, made in changes.items() if made)
    return None


def _partition_problems(
    forecast: Forecast, partition: SlurmPartition | None, request: JobScriptRequest | None
) -> list[Problem]:
    if partition is None:
        return []
    found = []
    if forecast.cluster.nodes > partition.nodes:
        found.append(
            Problem(
                True,
                f"nodes: partition {partition.name} gives a job {partition.nodes}, --nodes asks for "
                f"{forecast.cluster.nodes}; take fewer, or another --partition",
            )
        )
    if request and request.time_seconds and partition.longest and request.time_seconds > partition.longest:
        found.append(
            Problem(
                False,
                f"time: {request.script} asks for {_format_hours(request.time_seconds)}, partition {partition.name} allows "
                f"{_format_hours(partition.longest)} and would let the job wait for ever; give sbatch "
                f"--time={round(partition.longest // 60)}",
            )
        )
    if 0 < partition.grace < forecast.save_seconds:
        found.append(
            Problem(
                False,
                f"preemption: partition {partition.name} gives {partition.grace:.0f} s of grace, a checkpoint of "
                f"{forecast.checkpoint_bytes / 1e9:.2f} GB takes {forecast.save_seconds:.0f} s: what was done since the last "
                f"checkpoint is lost; lower checkpoint.every",
            )
        )
    return found


def _time_problems(forecast: Forecast, limits: JobLimits) -> list[Problem]:
    found = []
    save = forecast.save_seconds
    if limits.notice is not None and limits.notice < save:
        found.append(
            Problem(
                True,
                f"notice: {limits.whose} asks to be told {limits.notice:.0f} s before the end, a checkpoint takes "
                f"{save:.0f} s at {forecast.cluster.write_bytes_per_second / 1e9:.3g} GB/s; ask with --signal=USR1@{math.ceil(2 * save)}",
            )
        )
    step, every = forecast.step_seconds, forecast.plan.cfg.checkpoint.every
    if limits.time is None or step is None:
        return found
    useful = limits.time - STARTUP_SECONDS - (limits.notice or 0.0)
    interval = step * every
    if useful < step:
        found.append(
            Problem(
                True, f"time: of {_format_hours(limits.time)} nothing is left for a step of {step:.0f} s; ask for more"
            )
        )
    elif every and interval > useful and forecast.plan.total_steps > every:
        found.append(
            Problem(
                True,
                f"time: a job of {_format_hours(limits.time)} ends before its first checkpoint, which comes after "
                f"{_format_hours(interval)}: a node lost before that costs everything; set checkpoint.every="
                f"{max(1, int(useful / step / 4))}",
            )
        )
    return found


def _disk_problems(forecast: Forecast) -> list[Problem]:
    cfg, size = forecast.plan.cfg.checkpoint, forecast.checkpoint_bytes
    if cfg.gigabytes and 2 * size > cfg.gigabytes * 1e9:
        return [
            Problem(
                False,
                f"checkpoints: checkpoint.gigabytes={cfg.gigabytes:g} holds less than two of {size / 1e9:.2f} GB: the one "
                f"before the newest is gone when it is needed; raise it",
            )
        ]
    return []


def _timeout_problems(forecast: Forecast) -> list[Problem]:
    limit, step = 60 * forecast.plan.cfg.engine.timeout_minutes, forecast.step_seconds
    if step is not None and step > limit / 2:
        return [
            Problem(
                step > limit,
                f"timeout: a step takes {step:.0f} s and a collective gives up after engine.timeout_minutes="
                f"{limit / 60:g}; raise it above {math.ceil(step / 30)}",
            )
        ]
    return []


def _save_interval_problems(forecast: Forecast) -> list[Problem]:
    step, every = forecast.step_seconds, forecast.plan.cfg.checkpoint.every
    if step is not None and every and step * every < forecast.save_seconds:
        return [
            Problem(
                False,
                f"checkpoints: {every} steps take {step * every:.0f} s and writing a checkpoint {forecast.save_seconds:.0f} s: "
                f"training would wait for the disk; raise checkpoint.every",
            )
        ]
    return []


def _format_hours(seconds: float) -> str:
    """2:30:00, as Slurm writes it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
