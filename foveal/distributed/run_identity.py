"""The identity of a run, which its ranks compare before they train together."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from foveal.config import Config
from foveal.distributed.launcher import LaunchEnv, read_launch_id

IdentityRelation = Literal["same", "older", "newer", "sibling", "stranger"]
# Settings that may differ between the ranks of a run: paths on a node's own disk, and settings that only rank 0 reads.
_PER_RANK_SETTINGS = ("data.path", "data.index", "data.cache.", "data.mix.", "tracking.")
_MAX_DIFFERENCES_SHOWN = 3  # settings in a sentence


@dataclass(frozen=True)
class RunIdentity:
    """A run and one launch of it.

    ``launch_id``: the launcher's identifiers; ``settings``: flat settings that all ranks share. ``str`` names the run.
    """

    launch_id: dict[str, str]
    world_size: int
    command: str = ""
    run_dir: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_launch_env(
        cls, launch_env: LaunchEnv, command: str = "", cfg: Config | None = None, run_dir: str | None = None
    ) -> Self:
        """Return the identity of a rank that is about to run ``command`` (a stage's name, for example) with ``cfg``."""
        flat = {} if cfg is None else cfg.to_flat_dict()
        shared = {name: value for name, value in flat.items() if not name.startswith(_PER_RANK_SETTINGS)}
        return cls(
            read_launch_id(launch_env),
            launch_env.world_size,
            command,
            "" if run_dir is None else _absolute_path(run_dir),
            shared,
        )

    @property
    def store_key(self) -> str:
        """The prefix of the run's keys in the store: ranks of runs with another prefix read and write other keys."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def launcher_starts_all_ranks(self) -> bool:
        """Whether a launcher starts every rank. A missing rank is then late, not replaced by a rank of another run."""
        return "launcher" not in self.launch_id

    def to_json(self) -> str:
        """Return the identity as stored in the store."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the identity of a text from the store."""
        return cls(**json.loads(text))

    def relation_of(self, other: "RunIdentity") -> IdentityRelation:
        """Return the relation of another identity to this one.

        ``older`` and ``newer``: an attempt of the same Slurm job; ``sibling``: the same launch with other settings.
        """
        if self.store_key == other.store_key:
            return "same"
        if self.launch_id == other.launch_id:
            return "sibling"
        job, other_job = self.launch_id.get("job"), other.launch_id.get("job")
        restart, other_restart = (int(identity.launch_id.get("restart", "0")) for identity in (self, other))
        if job is not None and job == other_job and restart != other_restart:
            return "older" if other_restart < restart else "newer"
        return "stranger"

    def describe_differences(self, other: "RunIdentity") -> str:
        """Return the differences to another identity as a sentence, this identity's value first."""
        pairs: dict[str, tuple[Any, Any]] = {
            "the stage": (self.command, other.command),
            "run.dir": (self.run_dir, other.run_dir),
            "the number of ranks": (self.world_size, other.world_size),
        }
        settings, other_settings = _json_roundtrip(self.settings), _json_roundtrip(other.settings)
        names = sorted((settings.keys() | other_settings.keys()) - {"run.dir"})
        pairs |= {name: (settings.get(name), other_settings.get(name)) for name in names}
        differences = [f"{name} is {a} here and {b} there" for name, (a, b) in pairs.items() if a != b]
        shown = differences[:_MAX_DIFFERENCES_SHOWN]
        if len(differences) > _MAX_DIFFERENCES_SHOWN:
            shown.append(f"{len(differences) - _MAX_DIFFERENCES_SHOWN} more")
        return (
            "; ".join(shown)
            or f"it was started as {_format_launch_id(self.launch_id)}, "
            f"the other as {_format_launch_id(other.launch_id)}"
        )

    def __str__(self) -> str:
        run = f"the run {self.run_dir}" if self.run_dir else f"a {self.command or 'run'} without a directory"
        return f"{run} ({_format_launch_id(self.launch_id)})"


def _format_launch_id(launch_id: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in launch_id.items())


def _json_roundtrip(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as the store returns them, with lists for tuples."""
    return json.loads(json.dumps(settings, default=str))


def _absolute_path(directory: str) -> str:
    """Return a directory below the shell's path (PWD): resolved links to mounts may differ between nodes."""
    shell_path = os.environ.get("PWD", "")
    try:
        current = shell_path if shell_path and Path(shell_path).samefile(".") else str(Path.cwd())
    except OSError:
        current = str(Path.cwd())
    return os.path.normpath(Path(current, directory))
