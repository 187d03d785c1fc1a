"""What a run leaves for the next stage: its exports, and the weights of its best evaluations, one of which it may leave."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.atomic import drafted
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, ExportError
from foveal.training.plan import Plan
from foveal.training.provenance import versions
from foveal.weights.export import Card, part_of, write_export


class Exports:
    """The folders export/ and kept/<step>/ of a run. Every method is called by every rank.

    Weights are kept aside and never put over the export of a better evaluation before them: a run that is killed, or goes
    back, takes later evaluations anew, and on other ranks they may come out the worse.
    """

    def __init__(self, run: Path, stage: str, plan: Plan, world: World) -> None:
        self._run, self._stage, self._plan, self._world = run, stage, plan, world

    def write(
        self,
        engine: Engine,
        encoder: dict[str, Any],
        *,
        prefix: str,
        classes: tuple[str, ...],
        step: int,
        metrics: dict[str, float],
        head: dict[str, Any] | None = None,
        name: str = "",
        aside: bool = False,
    ) -> Path:
        """Write the weights whose names begin with ``prefix``, without it, and their card; the folder.

        ``head``: what builds the head again whose weights' names begin with ``head.``. ``aside``: in kept/<step>/. Errors: ExportError, on every rank, where it cannot be written.
        """
        folder = self._kept(step) if aside else self._run / "export" / name
        weights = engine.weights()
        about = {"step": step, "metrics": metrics, "versions": versions(), "head": head}
        card = self._plan.card(self._stage, encoder, classes, **about)
        mine, heads = part_of(weights, prefix), part_of(weights, "head.") if head else None
        self._world.once(lambda: _written(folder, mine, card, heads))
        return folder

    def leave(self, step: int) -> Path:
        """Make what was kept after a step the export; the folder.

        Errors: CheckpointError, on every rank, where it is not there any more; ExportError where it cannot be written.
        """
        return self._world.once(lambda: self._copied(step))

    def forget(self, before: int | None = None) -> None:
        """Remove what was kept before a step; none: all of it."""
        if self._world.rank == 0:
            kept = self._run / "kept"
            gone = (
                [kept] if before is None else [each for each in kept.glob("*") if each.name < self._kept(before).name]
            )
            for folder in gone:
                shutil.rmtree(folder, ignore_errors=True)

    def _kept(self, step: int) -> Path:
        return self._run / "kept" / f"{step:08d}"

    def _copied(self, step: int) -> Path:
        kept, folder = self._kept(step), self._run / "export"
        if not kept.is_dir():
            raise CheckpointError(
                f"{kept} is gone, which held the weights of the best evaluation; put it back, or begin anew with run.fresh=true"
            )
        with _room(folder), drafted(folder) as draft:
            shutil.copytree(kept, draft, dirs_exist_ok=True)
        return folder


def _written(folder: Path, weights: dict[str, Tensor], card: Card, head: dict[str, Tensor] | None) -> None:
    with _room(folder):
        write_export(folder, weights, card, head)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """What a file system refuses, in a sentence, so that every rank hears it. Errors: ExportError."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written ({error}); make room and start again: the run goes on from its newest checkpoint"
        ) from None
