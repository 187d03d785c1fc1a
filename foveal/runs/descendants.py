"""The runs and exports in a folder that were made from a model: its lineage downwards."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveal.atomic import read_json
from foveal.errors import FovealError
from foveal.runs.card_record import CARD, iter_science_models, read_card_record
from foveal.runs.inputs import ModelInput, RunInputs, read_inputs
from foveal.runs.record import NESTED_FOLDERS, is_run

# Folders of a run that hold exports or further runs; the others may hold thousands of files.
_FOLDERS_OF_RUNS = {"export", *NESTED_FOLDERS}


@dataclass(frozen=True)
class Descendant:
    """An export, or a run before its first one, that was made from a model.

    roles: how, from its own source to the model: (``init``, ``teacher``) was initialised from what the model taught.
    """

    path: str
    stage: str
    step: int | None
    sha256: str
    results: Mapping[str, float]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class _Candidate:
    path: str
    stage: str
    step: int | None = None
    sha256: str = ""
    results: Mapping[str, float] = field(default_factory=dict)
    inputs: RunInputs | None = None
    science: Mapping[str, Any] = field(default_factory=dict)

    def iter_sources(self) -> Iterator[tuple[ModelInput, tuple[str, ...]]]:
        """Yield the models of its lineage with the roles that lead to them; of older versions the nearest."""
        if self.inputs is not None:
            yield from self.inputs.iter_ancestors()
            return
        for role, digest in iter_science_models(self.science):
            path = str(self.science.get("inherited.fork.run", "")) if role == "fork" else ""
            step = self.science.get("inherited.fork.step", 0) if role == "fork" else 0
            yield ModelInput(role, path, digest, "", step), (role,)


@dataclass(frozen=True)
class Ancestor:
    """Models whose descendants are wanted.

    digests: of their weights. run: absolute path of their run, whose forks are descendants; "" for none. fork_step: only
    forks of this step's checkpoint are; None: all.
    """

    digests: frozenset[str]
    run: str = ""
    fork_step: int | None = None

    def is_forked_by(self, model: ModelInput) -> bool:
        """Return whether a source of a fork is the run, at the step."""
        is_run = model.role == "fork" and bool(self.run) and model.path == self.run
        return is_run and self.fork_step in (None, model.step)


def find_descendants(ancestor: Ancestor, folder: Path) -> list[Descendant]:
    """Return what was made from models in a folder, at any depth, nearest first.

    Records that cannot be read are left out, like folders of others.
    """
    digests = ancestor.digests
    candidates = list(_iter_candidates(folder))
    roles_by_digest: dict[str, tuple[str, ...]] = dict.fromkeys(digests, ())
    found: dict[str, Descendant] = {}
    is_growing = True
    while is_growing:  # a record of an older version names its nearest ancestors only
        is_growing = False
        for item in candidates:
            roles = None if item.path in found or item.sha256 in digests else _match(item, roles_by_digest, ancestor)
            if roles is None:
                continue
            found[item.path] = Descendant(item.path, item.stage, item.step, item.sha256, item.results, roles)
            if item.sha256:
                roles_by_digest.setdefault(item.sha256, roles)
            is_growing = True
    return sorted(found.values(), key=lambda item: (len(item.roles), item.path))


def _match(
    item: _Candidate, roles_by_digest: Mapping[str, tuple[str, ...]], ancestor: Ancestor
) -> tuple[str, ...] | None:
    """Return the shortest way from an item to one of the models, as roles; None without one."""
    ways = []
    for model, roles in item.iter_sources():
        if ancestor.is_forked_by(model):
            ways.append(roles)
        elif model.sha256 in roles_by_digest:
            ways.append((*roles, *roles_by_digest[model.sha256]))
    return min(ways, key=len, default=None)


def _iter_candidates(folder: Path) -> Iterator[_Candidate]:
    """Yield every export, and every run without one, in a folder."""
    runs_without_export: dict[str, Path] = {}
    for root, folders, files in os.walk(folder):
        path = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_run(path):
            folders[:] = [name for name in folders if name in _FOLDERS_OF_RUNS]
            if not any((path / "export").rglob(CARD)):
                runs_without_export[root] = path
        if CARD in files:
            try:
                card = read_card_record(path)
                inputs = card.read_inputs()
            except FovealError:
                continue
            place = str(path.resolve())
            yield _Candidate(place, card.stage, card.step, card.sha256, card.results, inputs, card.science)
    for path in runs_without_export.values():
        try:
            inputs = read_inputs(path)
            science = {} if inputs is not None else read_json(path / "science.json")
        except (FovealError, OSError):
            continue
        yield _Candidate(str(path.resolve()), "" if inputs is None else inputs.stage, inputs=inputs, science=science)
