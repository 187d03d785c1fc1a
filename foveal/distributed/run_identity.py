"""Which run a rank belongs to: what the ranks compare before they train together."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from foveal.config import Config
from foveal.distributed.launcher import Seat, launch_facts

Kinship = Literal["same", "older", "newer", "sibling", "stranger"]
# Settings that ranks of one run may have each for itself: places on a node's own disk, and what rank 0 alone reads.
_OF_ONE_RANK = ("data.path", "data.index", "data.cache.", "data.mix.", "tracking.")
_SHOWN = 3  # settings in a sentence


@dataclass(frozen=True)
class RunIdentity:
    """A run and one start of it. ``launch``: the launcher's own numbers; ``settings``: those that all ranks share."""

    launch: dict[str, str]
    size: int
    what: str = ""
    directory: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, here: Seat, what: str = "", cfg: Config | None = None, directory: str | None = None) -> Self:
        """The identity of a rank that is about to do ``what`` (a stage, say) with these settings."""
        flat = {} if cfg is None else cfg.flat()
        shared = {name: value for name, value in flat.items() if not name.startswith(_OF_ONE_RANK)}
        return cls(launch_facts(here), here.size, what, "" if directory is None else _absolute(directory), shared)

    @property
    def key(self) -> str:
        """Names the run in the store: ranks with another key read and write other words."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    @property
    def launcher_starts_all(self) -> bool:
        """Whether a launcher has started every rank: one that is missing comes late, and nobody came in its place."""
        return "launcher" not in self.launch

    def text(self) -> str:
        """The identity for the store."""
        return json.dumps(asdict(self), sort_keys=True, default=str)

    @classmethod
    def parse(cls, text: str) -> Self:
        """An identity from the store."""
        return cls(**json.loads(text))

    def kinship(self, other: "RunIdentity") -> Kinship:
        """What another identity is to this one.

        ``older`` and ``newer`` are attempts of one Slurm job, ``sibling`` is of the same launch with other settings.
        """
        if self.key == other.key:
            return "same"
        if self.launch == other.launch:
            return "sibling"
        mine, theirs = ({**each.launch} for each in (self, other))
        restarts = [int(each.pop("restart", "0")) for each in (mine, theirs)]
        if "job" in mine and mine.get("job") == theirs.get("job") and restarts[0] != restarts[1]:
            return "older" if restarts[1] < restarts[0] else "newer"
        return "stranger"

    def differences(self, other: "RunIdentity") -> str:
        """What another identity has otherwise, in words, its value last."""
        pairs: dict[str, tuple[Any, Any]] = {"the stage": (self.what, other.what)}
        pairs |= {"run.dir": (self.directory, other.directory), "the number of ranks": (self.size, other.size)}
        mine, theirs = _plain(self.settings), _plain(other.settings)
        names = sorted((mine.keys() | theirs.keys()) - {"run.dir"})
        pairs |= {name: (mine.get(name), theirs.get(name)) for name in names}
        unlike = [f"{name} is {a} here and {b} there" for name, (a, b) in pairs.items() if a != b]
        more = [f"{len(unlike) - _SHOWN} more"] if len(unlike) > _SHOWN else []
        return (
            "; ".join(unlike[:_SHOWN] + more)
            or f"it was started as {_words(self.launch)}, the other as {_words(other.launch)}"
        )

    def __str__(self) -> str:
        run = f"the run {self.directory}" if self.directory else f"a {self.what or 'run'} without a directory"
        return f"{run} ({_words(self.launch)})"


def _words(launch: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in launch.items())


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the store gives them back: lists for tuples."""
    return json.loads(json.dumps(settings, default=str))


def _absolute(directory: str) -> str:
    """A directory by the path that the shell shows: behind links to mounts, nodes may have different ones."""
    shown = os.environ.get("PWD", "")
    try:
        here = shown if shown and Path(shown).samefile(".") else str(Path.cwd())
    except OSError:
        here = str(Path.cwd())
    return os.path.normpath(Path(here, directory))
