"""Which run a rank belongs to: what the ranks compare before they train together."""

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
# Settings that ranks of one run may have each for itself: places on a node's own disk, and what rank 0 alone reads.
_PER_RANK_SETTINGS = ("data.path", "data.index", "data.cache.", "data.mix.", "tracking.")
_MAX_DIFFERENCES_SHOWN = 3  # settings in a sentence


@dataclass(frozen=True)
class RunIdentity:
    """A run and one start of it. ``launch``: the launcher's own numbers; ``settings``: those that all ranks share."""

    launch_id: dict[str, str]
    world_size: int
    command: str = ""
    run_dir: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_launch_env(
        cls, launch_env: LaunchEnv, command: str = "", cfg: Config | None = None, run_dir: str | None = None
    ) -> Self:
        """The identity of a rank that is about to do ``what`` (a stage, say) with these settings."""
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
        """Names the run in the store: ranks with another key read and write other words."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def launcher_starts_all_ranks(self) -> bool:
        """Whether a launcher has started every rank: one that is missing comes late, and nobody came in its place."""
        return "launcher" not in self.launch_id

    def to_json(self) -> str:
        """The identity for the store."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """An identity from the store."""
        return cls(**json.loads(text))

    def relation_to(self, other: "RunIdentity") -> IdentityRelation:
        """What another identity is to this one.

        ``older`` and ``newer`` are attempts of one Slurm job, ``sibling`` is of the same launch with other settings.
        """
        if self.store_key == other.store_key:
            return "same"
        if self.launch_id == other.launch_id:
            return "sibling"
        mine, theirs = ({**each.launch_id} for each in (self, other))
        restarts = [int(each.pop("restart", "0")) for each in (mine, theirs)]
        if "job" in mine and mine.get("job") == theirs.get("job") and restarts[0] != restarts[1]:
            return "older" if restarts[1] < restarts[0] else "newer"
        return "stranger"

    def describe_differences(self, other: "RunIdentity") -> str:
        """What another identity has otherwise, in words, its value last."""
        pairs: dict[str, tuple[Any, Any]] = {"the stage": (self.command, other.command)}
        pairs |= {"run.dir": (self.run_dir, other.run_dir), "the number of ranks": (self.world_size, other.world_size)}
        mine, theirs = _json_roundtrip(self.settings), _json_roundtrip(other.settings)
        names = sorted((mine.keys() | theirs.keys()) - {"run.dir"})
        pairs |= {name: (mine.get(name), theirs.get(name)) for name in names}
        unlike = [f"{name} is {a} here and {b} there" for name, (a, b) in pairs.items() if a != b]
        more = [f"{len(unlike) - _MAX_DIFFERENCES_SHOWN} more"] if len(unlike) > _MAX_DIFFERENCES_SHOWN else []
        return (
            "; ".join(unlike[:_MAX_DIFFERENCES_SHOWN] + more)
            or f"it was started as {_format_launch_id(self.launch_id)}, the other as {_format_launch_id(other.launch_id)}"
        )

    def __str__(self) -> str:
        run = f"the run {self.run_dir}" if self.run_dir else f"a {self.command or 'run'} without a directory"
        return f"{run} ({_format_launch_id(self.launch_id)})"


def _format_launch_id(launch: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in launch.items())


def _json_roundtrip(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the store gives them back: lists for tuples."""
    return json.loads(json.dumps(settings, default=str))


def _absolute_path(directory: str) -> str:
    """A directory by the path that the shell shows: behind links to mounts, nodes may have different ones."""
    shown = os.environ.get("PWD", "")
    try:
        here = shown if shown and Path(shown).samefile(".") else str(Path.cwd())
    except OSError:
        here = str(Path.cwd())
    return os.path.normpath(Path(here, directory))
