"""Exports of a run: the weights for the next stage, and the weights of the best evaluations, a candidate for export."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from foveal.atomic import atomic_folder, read_json, write_json
from foveal.distributed.world import World
from foveal.engines.base import Engine
from foveal.errors import CheckpointError, ExportError
from foveal.runs.inputs import DatasetInput, RunInputs
from foveal.training.plan import Plan
from foveal.training.provenance import get_library_versions
from foveal.training.run_inputs import collect_inputs
from foveal.weights.export import Card, describe_export, filter_and_strip_prefix, read_card, write_export
from foveal.weights.model_card_facts import DataFacts, ModelCardFacts


class Exporter:
    """Writes the folders export/ and kept/<step>/ of a run. Every rank calls every method.

    Each is also a folder of timm's and has a model card (``foveal.weights.export.describe_export``).
    The weights of a better evaluation never overwrite the export directly: a run that is killed or rolled back repeats
    later evaluations, perhaps on another number of ranks, and the repetition may score lower.
    """

    def __init__(self, run_dir: Path, stage_name: str, plan: Plan, world: World) -> None:
        self._run_dir, self._stage_name, self._plan, self._world = run_dir, stage_name, plan, world

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
        """Write the weights whose names begin with ``prefix``, with the prefix removed, and their card.

        Returns the folder: kept/<step>/ if ``as_best``, else export/<name>. ``head``: how to rebuild the head, whose
        weights' names begin with ``head.``; None: no head. Raises: ExportError, on every rank, if writing fails.
        """
        folder = self._best_folder(step) if as_best else self._run_dir / "export" / name
        weights = engine.gather_full_state_dict()
        card = self._plan.build_card(
            self._stage_name,
            encoder_card,
            classes,
            step=step,
            metrics=metrics,
            versions=get_library_versions(),
            head=head,
        )
        encoder_weights = filter_and_strip_prefix(weights, prefix)
        head_weights = filter_and_strip_prefix(weights, "head.") if head else None

        def write() -> None:
            described = replace(card, inputs=self._inputs.to_dict())
            _write_folder(folder, encoder_weights, described, head_weights, self._card_facts(name or None))

        self._world.on_rank0(write)
        return folder

    def publish_best(self, step: int) -> Path:
        """Copy kept/<step>/ to export/ and return export/.

        Raises: CheckpointError, on every rank, if kept/<step>/ does not exist; ExportError if writing fails.
        """
        return self._world.on_rank0(lambda: self._copy_to_export(step))

    def adopt_best(self, other_run_dir: Path, step: int) -> bool:
        """Copy kept/<step>/ of another run, or its export of that step, to kept/<step>/. For rank 0.

        Returns whether the weights were there.
        """
        best = self._best_folder(step)
        for folder in (other_run_dir / "kept" / best.name, other_run_dir / "export"):
            try:
                if read_card(folder).step != step:
                    continue
                with atomic_folder(best) as draft:
                    shutil.copytree(folder, draft, dirs_exist_ok=True)
            except (ExportError, OSError):  # its run has removed it, perhaps while it was copied
                continue
            return True
        return False

    def remove_best(self, before_step: int | None = None) -> None:
        """Remove the folders kept/<step>/ of the steps before ``before_step``; None: remove kept/."""
        if self._world.rank != 0:
            return
        root = self._run_dir / "kept"
        if before_step is None:
            obsolete = [root]
        else:
            obsolete = [folder for folder in root.glob("*") if folder.name < self._best_folder(before_step).name]
        for folder in obsolete:
            shutil.rmtree(folder, ignore_errors=True)

    @cached_property
    def _inputs(self) -> RunInputs:
        """What the run was made from, on rank 0; one attempt does not change it."""
        return collect_inputs(self._stage_name, self._run_dir, self._plan)

    def _card_facts(self, student: str | None = None) -> ModelCardFacts:
        """Return what the model cards say of the run's data and settings."""
        datasets = self._inputs.datasets
        training = tuple(_data_facts(data) for data in datasets if data.role == "training")
        evaluation = next((_data_facts(data) for data in datasets if data.role == "evaluation"), None)
        return ModelCardFacts(training, evaluation, **self._plan.cfg.card.to_dict(), student=student)

    def _best_folder(self, step: int) -> Path:
        return self._run_dir / "kept" / f"{step:08d}"

    def _copy_to_export(self, step: int) -> Path:
        best, folder = self._best_folder(step), self._run_dir / "export"
        if not best.is_dir():
            raise CheckpointError(
                f"{best}, the weights of the best evaluation, is gone; put it back, or begin anew with run.fresh=true"
            )
        with _as_export_error(folder), atomic_folder(folder) as draft:
            shutil.copytree(best, draft, dirs_exist_ok=True)
            # The best weights may be of an older version, or those of a fork's source, which had the same data.
            fork, card = self._plan.fork, read_json(draft / "card.json")
            science = card["science"] | ({} if fork is None else fork.card_facts())
            write_json(draft / "card.json", card | {"science": science, "inputs": self._inputs.to_dict()})
            describe_export(draft, read_card(draft), self._card_facts())
        return folder


def _data_facts(data: DatasetInput) -> DataFacts:
    return DataFacts(data.name, data.split, data.num_images, data.num_used)


def _write_folder(
    folder: Path, weights: dict[str, Tensor], card: Card, head: dict[str, Tensor] | None, facts: ModelCardFacts
) -> None:
    with _as_export_error(folder):
        write_export(folder, weights, card, head, facts)


@contextmanager
def _as_export_error(folder: Path) -> Iterator[None]:
    """Turn an OSError into an ExportError, which ``World.on_rank0`` raises on every rank."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written ({error}); make room and start again: the run goes on from its newest "
            f"checkpoint"
        ) from None
