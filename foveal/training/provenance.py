"""Provenance of results: library versions, git commit, Slurm job."""

import importlib.metadata
import logging
import shutil
import subprocess
import time

from foveal import __version__
from foveal.distributed.world import World
from foveal.slurm import slurm_job_tags

_log = logging.getLogger(__name__)


def get_library_versions() -> dict[str, str]:
    """Return the versions of foveal and of the libraries that can change a result."""
    names = ("torch", "timm", "deepspeed", "accelerate", "Pillow", "numpy")
    return {"foveal": __version__, **{name: importlib.metadata.version(name) for name in names}}


def warn_if_versions_changed(saved_versions: dict[str, str]) -> None:
    """Log a warning with the libraries whose versions differ from those that wrote a checkpoint."""
    changes = [
        f"{name} {saved_versions.get(name)} -> {current}"
        for name, current in get_library_versions().items()
        if saved_versions.get(name) != current
    ]
    if changes:
        _log.warning(
            "the checkpoint was written by other versions (%s); numbers may move in their last digits",
            ", ".join(changes),
        )


def collect_attempt_tags(world: World) -> dict[str, str]:
    """Return the tracker's tags of this attempt: start time, ranks, Slurm job, library versions, git commit."""
    tags = {"attempt.started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ranks": str(world.size), **slurm_job_tags()}
    tags |= {f"version.{name}": version for name, version in get_library_versions().items()}
    if shutil.which("git") is None:
        return tags
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return tags | ({"git.commit": result.stdout.strip()} if result.returncode == 0 else {})
