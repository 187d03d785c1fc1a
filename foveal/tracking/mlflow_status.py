"""The states of runs in MLflow's words."""

from collections.abc import Sequence

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

# MLflow draws a red cross for KILLED as for FAILED. SCHEDULED is drawn as waiting, which is what a run is that has saved
# its checkpoint and left as asked: its next attempt goes on. RUNNING would be untrue, and no monitor would see the end.
_WAITS = "SCHEDULED"
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "saved-and-left": _WAITS}


def status_of(state: str) -> str:
    """Return MLflow's status of an attempt's state."""
    return _STATUS.get(state, "FAILED")


def set_status(client: MlflowClient, run_id: str, status: str, end_time: int | None = None) -> None:
    """Set the status of a run if it has another; a status other than RUNNING sets the end, in milliseconds, too."""
    info = client.get_run(run_id).info
    if info.status == status and end_time in (None, info.end_time):
        return
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status, end_time)


def combine_statuses(stages: Sequence[Run]) -> str:
    """Return the status of a pipeline: running while a stage runs, finished if all that began are, else as the newest.

    If the newest is finished and an older one is not, that one waits or has failed.
    """
    statuses = [run.info.status for run in sorted(stages, key=lambda run: run.info.start_time)]
    if not statuses or "RUNNING" in statuses:
        return "RUNNING"
    if statuses[-1] == "FINISHED" and _WAITS in statuses:
        return _WAITS
    if statuses[-1] == "FINISHED" and set(statuses) != {"FINISHED"}:
        return "FAILED"
    return statuses[-1]
