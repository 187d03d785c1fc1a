"""Checks of what a run needs on a node: its settings, its disk, its shards, its libraries, its tracking server."""

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
from foveal.data.image.decode import jpeg_decoder_name
from foveal.doctor.report import RankReport, classify_error
from foveal.engines.base import EngineConfig
from foveal.errors import FovealError
from foveal.forecast.forecast import ClusterSpec, Forecast
from foveal.training.plan import Plan
from foveal.training.provenance import get_library_versions

_TEST_WRITE_BYTES = 64 << 20  # bytes
_TEST_BLOCK_BYTES = 4 << 20
_SHARDS_TO_READ, _HEAD_BYTES = 4, 512  # how many shards are touched, and how many bytes of each
_CONNECT_TIMEOUT_SECONDS = 5.0  # seconds for the tracking server
_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}  # what another start would meet again


@dataclass(frozen=True)
class PlannedRun:
    """The run that is to come: a stage and its plan for these ranks."""

    stage: Any
    plan: Plan

    @property
    def nearest_existing_folder(self) -> Path:
        """The nearest folder of the run directory that exists."""
        path = Path(str(self.plan.cfg.run.dir)).absolute()
        return next(each for each in (path, *path.parents) if each.exists())


def check_software_versions(report: RankReport) -> None:
    """Versions and commit, to be the same everywhere."""
    report.facts |= {f"version of {name}": value for name, value in get_library_versions().items()}
    report.facts["decoder"] = jpeg_decoder_name()
    if shutil.which("git"):
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        report.facts["commit"] = said.stdout.strip() if said.returncode == 0 else "none"


def check_engine_import(report: RankReport, cfg: EngineConfig) -> None:
    """Whether the engine's library can be imported."""
    if cfg.kind != "deepspeed":
        return
    from foveal.engines.deepspeed import import_deepspeed

    try:
        import_deepspeed()
    except Exception as error:  # noqa: BLE001 - whatever an import may raise is the finding
        report.add_fault("config", f"DeepSpeed cannot be imported ({type(error).__name__}: {error})")


def check_disk(report: RankReport, planned_run: PlannedRun) -> None:
    """Room for the checkpoints that are kept and the one that is written, and the speed of a write."""
    plan = planned_run.plan
    size = Forecast(planned_run.stage, plan, ClusterSpec(1, plan.world_size, 1.0, 1.0)).checkpoint_bytes
    there = sum(file.stat().st_size for file in Path(str(plan.cfg.run.dir)).glob("checkpoints/step-*/*"))
    free = shutil.disk_usage(planned_run.nearest_existing_folder).free
    report.facts |= {"disk_free": free, "checkpoint_bytes": size}
    if free < size:
        report.add_fault(
            "config",
            f"{planned_run.nearest_existing_folder} has {format_bytes(free)} free and a checkpoint needs {format_bytes(size)}; make room, or set "
            f"run.dir to another disk",
        )
    elif free + there < (needed := size * (plan.cfg.checkpoint.keep + 1)):
        report.add_fault(
            "note",
            f"{planned_run.nearest_existing_folder} has {format_bytes(free)} free, and checkpoint.keep={plan.cfg.checkpoint.keep} and the next one "
            f"come to {format_bytes(needed)}",
        )
    draft = planned_run.nearest_existing_folder / f".foveal-doctor-{report.node}-{os.getpid()}"
    try:
        report.facts["write_speed"] = _measure_write_speed(
            draft, min(_TEST_WRITE_BYTES, max(_TEST_BLOCK_BYTES, free // 2))
        )
    except OSError as error:
        full = error.errno in DISK_FULL_ERRNOS
        why = "full, or over a quota or limit" if full else "not to be written"
        settled = full or error.errno in _PERMANENT_ERRNOS
        report.add_fault(
            "config" if settled else "reach",
            f"{planned_run.nearest_existing_folder} is {why} ({error.strerror}); set run.dir to a place that can be written",
        )
    finally:
        draft.unlink(missing_ok=True)


def _measure_write_speed(file: Path, size: int) -> float:
    """Bytes a second, down to the disk."""
    piece, start = os.urandom(_TEST_BLOCK_BYTES), time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // _TEST_BLOCK_BYTES):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return size // _TEST_BLOCK_BYTES * _TEST_BLOCK_BYTES / (time.perf_counter() - start)


def check_shards(report: RankReport, planned_run: PlannedRun) -> None:
    """The first bytes of a few shards of every set, other ones on every rank, so that together they see many."""
    plan = planned_run.plan
    for source in plan.training_set.sources:
        names = [shard.file for shard in source.dataset.manifest.splits[source.split].shards]
        step = max(1, len(names) // _SHARDS_TO_READ)
        for number in range(min(_SHARDS_TO_READ, len(names))):
            name = names[(report.rank + number * step) % len(names)]
            try:
                head = source.dataset.shard_folder.read_range(name, 0, _HEAD_BYTES)
            except FovealError as error:
                report.add_fault(classify_error(error), str(error))
                return
            if len(head) < _HEAD_BYTES:
                report.add_fault(
                    "config",
                    f"{source.dataset.shard_folder.display_path(name)} gives {len(head)} of its first {_HEAD_BYTES} bytes",
                )


def check_tracking_server(report: RankReport, uri: str | None) -> None:
    """Whether MLflow's server takes a connection; a run goes on without it."""
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
            f"MLflow's server {target.hostname}:{port} does not answer ({error}); the run keeps its numbers in metrics.jsonl",
        )
