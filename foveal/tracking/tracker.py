"""What a tracker can do, and its twin that does nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import field_validator

from foveal.config import Config, machine
from foveal.redact import find_secret_in_text, redact

MetricRow = dict[str, float]
MetricPoint = tuple[str, float, int, int]  # of a row: name, value, milliseconds since 1970, step
AttemptState = Literal["running", "finished", "saved-and-left", "failed", "diverged", "superseded"]
_LONGEST = 300  # letters of a library's error; a server's page about a 500 is longer


class TrackingConfig(Config):
    """Where MLflow's store is. The run directory's metrics.jsonl is written whatever stands here."""

    uri: str | None = machine(
        "sqlite:///runs/mlflow.db", "MLflow's tracking URI; a relative SQLite path starts here; none: no MLflow."
    )
    experiment: str = machine("foveal", "MLflow's experiment.")
    patience_seconds: float = machine(
        20.0, "How long a run that ends waits for MLflow; foveal track sync delivers what is left.", ge=0
    )

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and (what := find_secret_in_text(uri)):
            raise ValueError(
                f"the URI holds {what}, which would stand in every config.yaml; write ${{A_VARIABLE}} for the URI"
            )
        return uri


class Tracker(Protocol):
    """What every tracker can do. Only rank 0 has one that does anything."""

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str]) -> None:
        """The resolved settings, and facts about this attempt, which has begun."""
        ...

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        """Finished steps, in order; each row has its ``step``."""
        ...

    def log_results(self, results: MetricRow, step: int) -> None:
        """Numbers that only some steps have: an evaluation, or what came of the whole run."""
        ...

    def log_file(self, path: Path) -> None:
        """A file of the run directory worth keeping, and finished: a picture, a config, a card."""
        ...

    def rewind(self, to_step: int) -> None:
        """The run went back to a step: rows past it are void, and come again."""
        ...

    def skip_flush(self) -> None:
        """The end is near: what is not delivered by then waits for the next attempt, or for foveal track sync."""
        ...

    def close(self, state: AttemptState, reason: str = "") -> None:
        """The end of this attempt, and in a sentence why it ended."""
        ...


def summarize_error(error: Exception) -> str:
    """A library's error in one line, without secrets."""
    said = " ".join(redact(f"{type(error).__name__}: {error}").split())
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


class NullTracker:
    """For the ranks that do not speak."""

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str]) -> None: ...
    def log_rows(self, rows: Sequence[MetricRow]) -> None: ...
    def log_results(self, results: MetricRow, step: int) -> None: ...
    def log_file(self, path: Path) -> None: ...
    def rewind(self, to_step: int) -> None: ...
    def skip_flush(self) -> None: ...
    def close(self, state: AttemptState, reason: str = "") -> None: ...
