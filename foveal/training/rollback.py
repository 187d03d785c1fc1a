"""What becomes of steps whose update was refused: counted, gone back from and past, and at last given up on.

A refused update (loss or gradient not finite) leaves weights and moments as they were, on every rank. Several in a row
mean that the next will fare no better: the run goes back to its newest checkpoint and takes the same steps again,
without the batches that were refused. Nothing here depends on how often checkpoints are written, because the steps
between the checkpoint and the first refusal are taken again on the same batches and come out the same.
"""

import logging
import time
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog, parse_json_object, read_file_bytes
from foveal.config import Config, machine, science
from foveal.data.sampling.order import batch_index_for_step
from foveal.errors import CheckpointError, TrainingDivergedError

_log = logging.getLogger(__name__)


class RecoveryConfig(Config):
    """When a run goes back to its newest checkpoint, and when it gives up."""

    after: int = science(3, "Refused updates in a row after which the run goes back, and past their batches.", ge=1)
    rollbacks: int = machine(5, "How often a run may go back before it gives up.", ge=0)


class RollbackController:
    """The refused steps of a run and what was done about them; the same on every rank.

    ``rollbacks.jsonl`` remembers what no checkpoint holds yet: a run that is killed right after it went back does not
    meet the same batches again.
    """

    def __init__(
        self, run_dir: Path, cfg: RecoveryConfig, skipped_batches: list[int], rollbacks: list[dict[str, Any]]
    ) -> None:
        self._file, self._cfg = AppendLog(run_dir / "rollbacks.jsonl"), cfg
        self._journal = rollbacks
        self.skipped_batches = sorted({*skipped_batches, *(batch for entry in rollbacks for batch in entry["batches"])})
        self._refused: list[int] = []

    def observe_step(self, step: int, *, applied: bool) -> bool:
        """Hear what became of a step; True when it is time to go back."""
        self._refused = [] if applied else [*self._refused, step]
        return len(self._refused) >= self._cfg.after

    @property
    def last_update_applied(self) -> bool:
        """Whether the last step was applied: what comes after a refused one is no state to keep."""
        return not self._refused

    def record_rollback(self, to_step: int, *, is_writer: bool) -> None:
        """Write down that the run goes back to step ``to`` and past the batches of the refused steps.

        Raises: Diverged, on every rank, when it went back too often already.
        """
        first, last = self._refused[0], self._refused[-1]
        if len(self._journal) >= self._cfg.rollbacks:
            raise TrainingDivergedError(
                f"loss or gradients were not finite in the {len(self._refused)} steps {first} to {last}, after "
                f"{len(self._journal)} roll-backs; none of them changed a weight, and the newest checkpoint is whole: "
                f"start anew with run.fresh=true and a lower optim.lr_per_256, optim.clip or a longer optim.warmup_epochs"
            )
        batches = [batch_index_for_step(step - 1, self.skipped_batches) for step in self._refused]
        entry = {"time": time.time(), "to": to_step, "refused": self._refused, "batches": batches}
        if is_writer:
            self._file.append_json_lines([entry])
        _log.warning(
            "the updates of steps %d to %d were refused: going back to step %d and past their batches",
            first,
            last,
            to_step,
        )
        self._journal.append(entry)
        self.skipped_batches = sorted({*self.skipped_batches, *batches})
        self._refused = []


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """The roll-backs of a run so far; a last line that a kill cut short did not happen. Raises: CheckpointError."""
    file = run_dir / "rollbacks.jsonl"
    lines = read_file_bytes(file).splitlines(keepends=True) if file.exists() else []
    journal = [parse_json_object(line, file) for line in lines if line.endswith(b"\n")]
    for entry in journal:
        batches = entry.get("batches")
        if not isinstance(batches, list) or not all(type(batch) is int for batch in batches):
            raise CheckpointError(f"{file} is damaged (an entry lists no batches): restore it")
    return journal
