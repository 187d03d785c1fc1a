"""Provenance of results: library versions, git commit, user, Slurm job."""

import contextlib
import getpass
import importlib.metadata
import logging
import shutil
import subprocess
import time
from typing import Any

from foveal import __version__
from foveal.checkpoint.state import TrainState
from foveal.config import Config
from foveal.distributed.world import World
from foveal.redact import redact
from foveal.slurm import slurm_job_tags

_ROUNDING_SETTINGS = (
    "engine.precision",
    "engine.float32_matmul_precision",
    "engine.compile",
    "engine.max_explicit_attention_tokens",
)
_BEFORE_STORED = {"engine.max_explicit_attention_tokens": 0}  # of checkpoints without it
_CONSEQUENCE = "numbers may move in their last digits"
_log = logging.getLogger(__name__)


def get_library_versions() -> dict[str, str]:
    """Return the versions of foveal and of the libraries that can change a result."""
    names = ("torch", "timm", "deepspeed", "accelerate", "Pillow", "numpy")
    return {"foveal": __version__, **{name: _find_version(name) for name in names}}


def _find_version(library: str) -> str:
    """Return the version of a library. The plain engine runs without DeepSpeed and Accelerate."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def get_rounding_settings(cfg: Config) -> dict[str, Any]:
    """Return the machine settings that change rounding noticeably, by name."""
    settings = cfg.to_flat_dict()
    return {name: settings[name] for name in _ROUNDING_SETTINGS}


def warn_if_rounding_changed(state: TrainState, cfg: Config) -> None:
    """Log the library versions and rounding settings that differ from those under which a checkpoint was written.

    Checkpoints of versions that did not store a setting cause no warning about it, except where its value is known.
    """
    if versions := _list_changes(state.versions, get_library_versions()):
        _log.warning("the checkpoint was written by other versions (%s); %s", versions, _CONSEQUENCE)
    saved = _BEFORE_STORED | state.rounding if state.rounding else {}
    settings = {name: value for name, value in get_rounding_settings(cfg).items() if name in saved}
    if changes := _list_changes(saved, settings):
        _log.warning("the checkpoint was written under other settings (%s); %s", changes, _CONSEQUENCE)


def _list_changes(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Return "name old -> new" for every current value that differs from the saved one."""
    return ", ".join(f"{name} {saved.get(name)} -> {now}" for name, now in current.items() if saved.get(name) != now)


def collect_attempt_tags(world: World) -> dict[str, str]:
    """Return the tracker's tags of this attempt: start time, user, ranks, Slurm job, library versions, git's state."""
    tags = {"attempt.started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ranks": str(world.size), **slurm_job_tags()}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user id without a name
        tags["user"] = getpass.getuser()
    tags |= {f"version.{name}": version for name, version in get_library_versions().items()}
    return tags | _collect_git_tags()


def _collect_git_tags() -> dict[str, str]:
    """Return commit, branch and the remote's URL, without secrets, of the working directory; nothing outside git."""
    if shutil.which("git") is None:
        return {}
    commands = {
        "git.commit": ("rev-parse", "HEAD"),
        "git.branch": ("symbolic-ref", "--short", "--quiet", "HEAD"),
        "git.url": ("config", "--get", "remote.origin.url"),
    }
    tags = {}
    for name, command in commands.items():
        result = subprocess.run(["git", *command], capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout.strip():
            tags[name] = redact(result.stdout.strip())
    return tags
