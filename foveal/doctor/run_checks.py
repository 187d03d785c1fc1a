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

from foveal.atomic import FULL, in_gigabytes
from foveal.data.image.decode import decoder_name
from foveal.doctor.report import Report, kind_of
from foveal.engines.base import EngineConfig
from foveal.errors import FovealError
from foveal.forecast.forecast import Forecast, Machine
from foveal.training.plan import Plan
from foveal.training.provenance import versions

_WRITTEN = 64 << 20  # bytes
_PIECE = 4 << 20
_SHARDS, _HEAD = 4, 512  # how many shards are touched, and how many bytes of each
_CONNECTING = 5.0  # seconds for the tracking server
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}  # what another start would meet again


@dataclass(frozen=True)
class Subject:
    """The run that is to come: a stage and its plan for these ranks."""

    stage: Any
    plan: Plan

    @property
    def folder(self) -> Path:
        """The nearest folder of the run directory that exists."""
        path = Path(str(self.plan.cfg.run.dir)).absolute()
        return next(each for each in (path, *path.parents) if each.exists())


def software(report: Report) -> None:
    """Versions and commit, to be the same everywhere."""
    report.facts |= {f"version of {name}": value for name, value in versions().items()}
    report.facts["decoder"] = decoder_name()
    if shutil.which("git"):
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        report.facts["commit"] = said.stdout.strip() if said.returncode == 0 else "none"


def engine(report: Report, cfg: EngineConfig) -> None:
    """Whether the engine's library can be imported."""
    if cfg.kind != "deepspeed":
        return
    from foveal.engines.deepspeed import library

    try:
        library()
    except Exception as error:  # noqa: BLE001 - whatever an import may raise is the finding
        report.fault("config", f"DeepSpeed cannot be imported ({type(error).__name__}: {error})")


def disk(report: Report, subject: Subject) -> None:
    """Room for the checkpoints that are kept and the one that is written, and the speed of a write."""
    plan = subject.plan
    size = Forecast(subject.stage, plan, Machine(1, plan.ranks, 1.0, 1.0)).checkpoint_bytes
    there = sum(file.stat().st_size for file in Path(str(plan.cfg.run.dir)).glob("checkpoints/step-*/*"))
    free = shutil.disk_usage(subject.folder).free
    report.facts |= {"disk_free": free, "checkpoint_bytes": size}
    if free < size:
        report.fault(
            "config",
            f"{subject.folder} has {in_gigabytes(free)} free and a checkpoint needs {in_gigabytes(size)}; make room, or set "
            f"run.dir to another disk",
        )
    elif free + there < (needed := size * (plan.cfg.checkpoint.keep + 1)):
        report.fault(
            "note",
            f"{subject.folder} has {in_gigabytes(free)} free, and checkpoint.keep={plan.cfg.checkpoint.keep} and the next one "
            f"come to {in_gigabytes(needed)}",
        )
    draft = subject.folder / f".foveal-doctor-{report.node}-{os.getpid()}"
    try:
        report.facts["write_speed"] = _write_speed(draft, min(_WRITTEN, max(_PIECE, free // 2)))
    except OSError as error:
        full = error.errno in FULL
        why = "full, or over a quota or limit" if full else "not to be written"
        settled = full or error.errno in _REFUSED
        report.fault(
            "config" if settled else "reach",
            f"{subject.folder} is {why} ({error.strerror}); set run.dir to a place that can be written",
        )
    finally:
        draft.unlink(missing_ok=True)


def _write_speed(file: Path, size: int) -> float:
    """Bytes a second, down to the disk."""
    piece, start = os.urandom(_PIECE), time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // _PIECE):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return size // _PIECE * _PIECE / (time.perf_counter() - start)


def shards(report: Report, subject: Subject) -> None:
    """The first bytes of a few shards of every set, other ones on every rank, so that together they see many."""
    plan = subject.plan
    for source in plan.training.sources:
        names = [shard.file for shard in source.dataset.manifest.splits[source.split].shards]
        step = max(1, len(names) // _SHARDS)
        for number in range(min(_SHARDS, len(names))):
            name = names[(report.rank + number * step) % len(names)]
            try:
                head = source.dataset.place.read(name, 0, _HEAD)
            except FovealError as error:
                report.fault(kind_of(error), str(error))
                return
            if len(head) < _HEAD:
                report.fault(
                    "config", f"{source.dataset.place.where(name)} gives {len(head)} of its first {_HEAD} bytes"
                )


def tracking(report: Report, uri: str | None) -> None:
    """Whether MLflow's server takes a connection; a run goes on without it."""
    if uri is None:
        return
    target = urlsplit(os.path.expandvars(uri))
    if target.scheme not in {"http", "https"} or target.hostname is None:
        return
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=_CONNECTING).close()
    except OSError as error:
        report.fault(
            "note",
            f"MLflow's server {target.hostname}:{port} does not answer ({error}); the run keeps its numbers in metrics.jsonl",
        )
