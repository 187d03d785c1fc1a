"""Checks of a run's needs on a node: libraries, engine, disk, shards, tracking server."""

import errno
import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from foveal.atomic import DISK_FULL_ERRNOS, format_bytes
from foveal.data.image.decode import jpeg_decoder_and_version
from foveal.doctor.report import RankReport, classify_error
from foveal.engines.config import EngineConfig
from foveal.errors import FovealError
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.training.plan import Plan
from foveal.training.provenance import get_library_versions

_TEST_WRITE_BYTES = 64 << 20
_TEST_BLOCK_BYTES = 4 << 20
_SHARDS_TO_READ, _HEAD_BYTES = 4, 512  # shards of each source, and bytes of each shard
_CONNECT_TIMEOUT_SECONDS = 5.0  # for the tracking server
_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}  # the next start would fail too


@dataclass(frozen=True)
class PlannedRun:
    """The run that will start: a stage and its plan for these ranks."""

    stage: Any
    plan: Plan

    @property
    def nearest_existing_folder(self) -> Path:
        """The run directory, or its nearest parent that exists."""
        path = Path(str(self.plan.cfg.run.dir)).absolute()
        return next(folder for folder in (path, *path.parents) if folder.exists())


def record_software_versions(report: RankReport) -> None:
    """Report library versions, JPEG decoder and commit, which must be equal on all ranks."""
    report.facts |= {f"version of {name}": value for name, value in get_library_versions().items()}
    report.facts["decoder"] = jpeg_decoder_and_version()
    if shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        report.facts["commit"] = done.stdout.strip() if done.returncode == 0 else "none"


def check_engine_import(report: RankReport, cfg: EngineConfig) -> None:
    """Check that the engine's library can be imported."""
    if cfg.kind != "deepspeed":
        return
    from foveal.engines.deepspeed import import_deepspeed

    try:
        import_deepspeed()
    except Exception as error:  # noqa: BLE001 - any error of an import is a fault
        report.add_fault("config", f"DeepSpeed cannot be imported ({type(error).__name__}: {error})")


def check_checkpoint_disk(report: RankReport, planned_run: PlannedRun) -> None:
    """Check the free space for ``checkpoint.keep`` checkpoints and the next one, and measure the speed of a write."""
    plan, folder = planned_run.plan, planned_run.nearest_existing_folder
    size = Forecast(planned_run.stage, plan, ClusterSpec(1, plan.world_size, 1.0, 1.0)).checkpoint_bytes
    # One rank for all: a checkpoint has a file of each.
    checkpoints = Path(str(plan.cfg.run.dir)).glob("checkpoints/step-*/*") if report.rank == 0 else ()
    existing = sum(file.stat().st_size for file in checkpoints)
    free = shutil.disk_usage(folder).free
    report.facts |= {"disk_free": free, "checkpoint_bytes": size}
    if free < size:
        report.add_fault(
            "config",
            f"{folder} has {format_bytes(free)} free and a checkpoint needs {format_bytes(size)}; "
            f"make room, or set run.dir to another disk",
        )
    elif report.rank == 0 and free + existing < (needed := size * (plan.cfg.checkpoint.keep + 1)):
        report.add_fault(
            "note",
            f"{folder} has {format_bytes(free)} free, and checkpoint.keep={plan.cfg.checkpoint.keep} checkpoints and "
            f"the next one need {format_bytes(needed)}",
        )
    test_file = folder / f".foveal-doctor-{report.node}-{os.getpid()}"
    try:
        report.facts["write_speed"] = _measure_write_speed(
            test_file, min(_TEST_WRITE_BYTES, max(_TEST_BLOCK_BYTES, free // 2))
        )
    except OSError as error:
        full = error.errno in DISK_FULL_ERRNOS
        problem = "full, or over a quota or limit" if full else "not writable"
        permanent = full or error.errno in _PERMANENT_ERRNOS
        report.add_fault(
            "config" if permanent else "reach",
            f"{folder} is {problem} ({error.strerror}); set run.dir to a folder that can be written",
        )
    finally:
        test_file.unlink(missing_ok=True)


def _measure_write_speed(file: Path, size: int) -> float:
    """Write a file to the disk (fsync included). Return the bytes per second."""
    block, start = os.urandom(_TEST_BLOCK_BYTES), time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // _TEST_BLOCK_BYTES):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return size // _TEST_BLOCK_BYTES * _TEST_BLOCK_BYTES / (time.perf_counter() - start)


def check_some_shard_heads(report: RankReport, planned_run: PlannedRun) -> None:
    """Read the first bytes of a few shards of every source. Each rank reads other shards, so that many are covered."""
    plan = planned_run.plan
    for source in plan.training_set.sources:
        names = [shard.file for shard in source.dataset.manifest.splits[source.split].shards]
        step = max(1, len(names) // _SHARDS_TO_READ)
        for number in range(min(_SHARDS_TO_READ, len(names))):
            name = names[(report.rank + number * step) % len(names)]
            try:
                head = source.dataset.shard_folder.read_up_to(name, 0, _HEAD_BYTES)
            except FovealError as error:
                report.add_fault(classify_error(error), str(error))
                return
            if len(head) < _HEAD_BYTES:
                report.add_fault(
                    "config",
                    f"{source.dataset.shard_folder.display_path(name)} has only {len(head)} bytes of its first "
                    f"{_HEAD_BYTES}",
                )


def check_tracking_server(report: RankReport, uri: str | None) -> None:
    """Check that MLflow's server accepts a connection. A fault is only a note, since a run goes on without MLflow."""
    if uri is None:
        return
    target = urlsplit(os.path.expandvars(uri))
    if target.scheme not in {"http", "https"} or target.hostname is None:
        return
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=_CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        report.add_fault(
            "note",
            f"MLflow's server {target.hostname}:{port} does not answer ({error}); "
            f"the run keeps its numbers in metrics.jsonl",
        )
