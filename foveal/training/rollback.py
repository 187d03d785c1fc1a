"""Recovery from refused updates: count refusals, roll back past their batches, and give up at a limit.

A refused update (loss or gradient not finite) leaves weights and moments unchanged on every rank. Several refusals in a
row predict that the next update fares no better: the run rolls back to its newest checkpoint and repeats the steps
since then without the refused batches. The interval of checkpoints has no influence on the result: the steps between
the checkpoint and the first refusal repeat on the same batches with the same result.

Whether an update was refused is known on the device. The host learns of it a fixed number of steps later, and without
delay before it saves, evaluates or shows the weights. The delay has no influence either: the steps that follow a streak
of ``recovery.rollback_after_skips`` refusals before the host learns of it are void, and their batches are not skipped.
"""

import collections
import logging
import time
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from foveal.atomic import AppendLog, parse_json_object, read_file_bytes
from foveal.data.sampling.order import batch_index_for_step
from foveal.errors import CheckpointError, TrainingDivergedError
from foveal.training.config import RecoveryConfig
from foveal.training.meters.host_copy import HostCopy

_log = logging.getLogger(__name__)


class RollbackController:
    """The refused steps and roll-backs of a run; the same on every rank.

    ``rollbacks.jsonl`` stores roll-backs that no checkpoint holds yet: a run that is killed right after a roll-back
    skips the same batches.
    """

    steps_in_flight: ClassVar = 2  # steps that the host may run ahead of the device

    def __init__(
        self, run_dir: Path, cfg: RecoveryConfig, skipped_batches: list[int], rollbacks: list[dict[str, Any]]
    ) -> None:
        self._run_dir, self._file, self._cfg = run_dir, AppendLog(run_dir / "rollbacks.jsonl"), cfg
        self._unread_updates: collections.deque[tuple[int, HostCopy]] = collections.deque()
        self._rollbacks = rollbacks
        self.skipped_batches = sorted({*skipped_batches, *(batch for entry in rollbacks for batch in entry["batches"])})
        self._refused_steps: list[int] = []

    def add_update(self, step: int, applied: Tensor) -> None:
        """Add the update of a step: ``applied``, a scalar on the device, says whether it is applied or refused."""
        self._unread_updates.append((step, HostCopy(applied)))

    def read_updates(self, up_to_step: int) -> list[int]:
        """Wait for the updates up to a step and count refusals in a row; return the steps that were refused.

        Once a roll-back is due, the updates after it are not read: their steps are void.
        """
        refused_steps = []
        while self._unread_updates and self._unread_updates[0][0] <= up_to_step and not self.is_due:
            step, applied = self._unread_updates.popleft()
            if applied.read():
                self._refused_steps = []
            else:
                self._refused_steps.append(step)
                refused_steps.append(step)
        return refused_steps

    @property
    def is_due(self) -> bool:
        """Whether the run has to roll back, as far as updates were read."""
        return len(self._refused_steps) >= self._cfg.rollback_after_skips

    @property
    def last_update_applied(self) -> bool:
        """Whether the last update that was read was applied; no checkpoint is saved after a refused update."""
        return not self._refused_steps

    def record_rollback_or_raise(self, to_step: int, *, is_writer: bool) -> None:
        """Record a roll-back to ``to_step`` and skip the batches of the refused steps.

        Raises: TrainingDivergedError, on every rank, if the maximal number of roll-backs is reached.
        """
        first, last = self._refused_steps[0], self._refused_steps[-1]
        if len(self._rollbacks) >= self._cfg.max_rollbacks:
            raise TrainingDivergedError(
                f"loss or gradients were not finite in the {len(self._refused_steps)} steps {first} to {last}, after "
                f"{len(self._rollbacks)} roll-backs; none of them changed a weight, and the newest checkpoint is "
                f"intact: go on from it in a new run with run.fork={self._run_dir}, another run.dir and a lower "
                f"optim.lr_per_256 or optim.max_grad_norm, or start anew with run.fresh=true"
            )
        batches = [batch_index_for_step(step - 1, self.skipped_batches) for step in self._refused_steps]
        entry = {"time": time.time(), "to": to_step, "refused": self._refused_steps, "batches": batches}
        if is_writer:
            self._file.append_json_lines([entry])
        _log.warning(
            "the updates of steps %d to %d were refused: rolling back to step %d and skipping their batches",
            first,
            last,
            to_step,
        )
        self._rollbacks.append(entry)
        self.skipped_batches = sorted({*self.skipped_batches, *batches})
        self._refused_steps = []
        self._unread_updates.clear()


def read_rollbacks(run_dir: Path) -> list[dict[str, Any]]:
    """Return the roll-backs of a run so far, without a last line that a kill cut short. Raises: CheckpointError."""
    file = run_dir / "rollbacks.jsonl"
    lines = read_file_bytes(file).splitlines(keepends=True) if file.exists() else []
    rollbacks = [parse_json_object(line, file) for line in lines if line.endswith(b"\n")]
    for entry in rollbacks:
        batches = entry.get("batches")
        if not isinstance(batches, list) or not all(type(batch) is int for batch in batches):
            raise CheckpointError(f"{file} is damaged (an entry lists no batches): restore it")
    return rollbacks
