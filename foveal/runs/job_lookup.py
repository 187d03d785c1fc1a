"""What Slurm says about the job of an attempt, for a reader that may look at hundreds of runs."""

from collections.abc import Callable

from foveal.slurm import (
    SlurmAccountingSilentError,
    SlurmJobStatus,
    SlurmUnavailableError,
    read_slurm_config,
    show_job,
    show_job_or_end,
)
from foveal.training.lease_holder import LeaseHolder

_TIMEOUT_SECONDS = 5.0  # of a command: a controller without answer must not hold a display
_MAX_JOBS = 100  # of one look: a command takes ten milliseconds, and more on a busy controller


class JobLookup:
    """Asks Slurm for each job once. After a command without answer nothing of it is asked any more."""

    def __init__(self, show: Callable[[str, float], SlurmJobStatus | None] = show_job_or_end) -> None:
        self._show: Callable[[str, float], SlurmJobStatus | None] = show
        self._jobs: dict[str, SlurmJobStatus | None] = {}
        self._cluster: str | None = None  # not asked yet
        self._is_available = True

    def find(self, holder: LeaseHolder | None) -> SlurmJobStatus | None:
        """Return the job of an attempt; None without a job, without Slurm, or for a job of another cluster."""
        if holder is None or not holder.job:
            return None
        if holder.cluster and holder.cluster != self._read_cluster():
            return None
        return self.find_by_id(holder.job)

    def find_by_id(self, job_id: str) -> SlurmJobStatus | None:
        """Return a job of this cluster; None if Slurm does not say."""
        if job_id not in self._jobs and self._is_available and len(self._jobs) < _MAX_JOBS:
            try:
                self._jobs[job_id] = self._show(job_id, _TIMEOUT_SECONDS)
            except SlurmAccountingSilentError:
                self._jobs[job_id] = None
                self._show = show_job  # the controller alone
            except SlurmUnavailableError:
                self._is_available = False
        return self._jobs.get(job_id)

    def _read_cluster(self) -> str:
        if self._cluster is None:
            self._cluster = read_slurm_config(_TIMEOUT_SECONDS).cluster if self._is_available else ""
        return self._cluster
