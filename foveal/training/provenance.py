"""What a number was made with: libraries, commit, job."""

import importlib.metadata
import logging
import shutil
import subprocess
import time

from foveal import __version__
from foveal.distributed.world import World, slurm_job_tags

_log = logging.getLogger(__name__)


def get_library_versions() -> dict[str, str]:
    """The libraries that can move a number."""
    names = ("torch", "timm", "deepspeed", "accelerate", "Pillow", "numpy")
    return {"foveal": __version__, **{name: importlib.metadata.version(name) for name in names}}


def warn_if_versions_changed(saved_versions: dict[str, str]) -> None:
    """Say which libraries are others than those that wrote a checkpoint."""
    changed = [
        f"{name} {saved_versions.get(name)} -> {now}"
        for name, now in get_library_versions().items()
        if saved_versions.get(name) != now
    ]
    if changed:
        _log.warning(
            "the checkpoint was written by other versions (%s); numbers may move in their last digits",
            ", ".join(changed),
        )


def collect_attempt_tags(world: World) -> dict[str, str]:
    """Tags of this attempt."""
    facts = {"attempt.started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "ranks": str(world.size), **slurm_job_tags()}
    facts |= {f"version.{name}": value for name, value in get_library_versions().items()}
    if shutil.which("git") is None:
        return facts
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return facts | ({"git.commit": commit.stdout.strip()} if commit.returncode == 0 else {})
