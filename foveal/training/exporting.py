"""What a run leaves for the next stage: its exports, and the weights of its best evaluations, one of which it may leave."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.atomic import atomic_folder
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, ExportError
from foveal.training.plan import Plan
from foveal.training.provenance import get_library_versions
from foveal.weights.export import Card, filter_and_strip_prefix, write_export


class Exporter:
    """The folders export/ and kept/<step>/ of a run. Every method is called by every rank.

    Weights are kept aside and never put over the export of a better evaluation before them: a run that is killed, or goes
    back, takes later evaluations anew, and on other ranks they may come out the worse.
    """

    def __init__(self, run_dir: Path, stage_name: str, plan: Plan, world: World) -> None:
        self._run, self._stage, self._plan, self._world = run_dir, stage_name, plan, world

    def write_weights(
        self,
        engine: Engine,
        encoder_card: dict[str, Any],
        *,
        prefix: str,
        classes: tuple[str, ...],
        step: int,
        metrics: dict[str, float],
        head: dict[str, Any] | None = None,
        name: str = "",
        as_best: bool = False,
    ) -> Path:
        """Write the weights whose names begin with ``prefix``, without it, and their card; the folder.

        ``head``: what builds the head again whose weights' names begin with ``head.``. ``aside``: in kept/<step>/. Raises: ExportError, on every rank, where it cannot be written.
        """
        folder = self._best_folder(step) if as_best else self._run / "export" / name
        weights = engine.full_state_dict()
        about = {"step": step, "metrics": metrics, "versions": get_library_versions(), "head": head}
        card = self._plan.build_card(self._stage, encoder_card, classes, **about)
        mine, heads = (
            filter_and_strip_prefix(weights, prefix),
            filter_and_strip_prefix(weights, "head.") if head else None,
        )
        self._world.on_rank0(lambda: _write_folder(folder, mine, card, heads))
        return folder

    def publish_best(self, step: int) -> Path:
        """Make what was kept after a step the export; the folder.

        Raises: CheckpointError, on every rank, where it is not there any more; ExportError where it cannot be written.
        """
        return self._world.on_rank0(lambda: self._copy_to_export(step))

    def remove_best(self, before_step: int | None = None) -> None:
        """Remove what was kept before a step; none: all of it."""
        if self._world.rank == 0:
            kept = self._run / "kept"
            gone = (
                [kept]
                if before_step is None
                else [each for each in kept.glob("*") if each.name < self._best_folder(before_step).name]
            )
            for folder in gone:
                shutil.rmtree(folder, ignore_errors=True)

    def _best_folder(self, step: int) -> Path:
        return self._run / "kept" / f"{step:08d}"

    def _copy_to_export(self, step: int) -> Path:
        kept, folder = self._best_folder(step), self._run / "export"
        if not kept.is_dir():
            raise CheckpointError(
                f"{kept} is gone, which held the weights of the best evaluation; put it back, or begin anew with run.fresh=true"
            )
        with _as_export_error(folder), atomic_folder(folder) as draft:
            shutil.copytree(kept, draft, dirs_exist_ok=True)
        return folder


def _write_folder(folder: Path, weights: dict[str, Tensor], card: Card, head: dict[str, Tensor] | None) -> None:
    with _as_export_error(folder):
        write_export(folder, weights, card, head)


@contextmanager
def _as_export_error(folder: Path) -> Iterator[None]:
    """What a file system refuses, in a sentence, so that every rank hears it. Raises: ExportError."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written ({error}); make room and start again: the run goes on from its newest checkpoint"
        ) from None
