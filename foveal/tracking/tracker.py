"""The protocol of trackers, their settings, and the tracker of the ranks that log nothing."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import field_validator, model_validator

from foveal.config import Config, machine
from foveal.redact import describe_secret_in_urls, redact

MetricRow = dict[str, float]
MetricPoint = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step
AttemptState = Literal["running", "finished", "saved-and-left", "failed", "diverged", "superseded"]
_ALIAS, _VERSION_ALIAS = re.compile(r"[\w-]+", re.ASCII), re.compile(r"[vV]\d+")
_MAX_ERROR_LENGTH = 300  # characters of a library's error; a server's error page is longer


with warnings.catch_warnings():
    # "register" is also what every class with an abstract base has; pydantic warns of it, and nobody calls it here.
    warnings.filterwarnings("ignore", 'Field name "register"', UserWarning)

    class TrackingConfig(Config):
        """Settings of MLflow. The run directory's metrics.jsonl is written with any of them."""

        uri: str | None = machine(
            "sqlite:///runs/mlflow.db",
            "MLflow's tracking URI; a relative SQLite path starts in the working directory; null: no MLflow.",
        )
        experiment: str = machine("foveal", "MLflow's experiment.")
        flush_timeout_seconds: float = machine(
            20.0, "Seconds that the end of a run waits for uploads; foveal track sync delivers the rest.", ge=0
        )
        upload_models: bool = machine(
            False,
            "Upload the weights of exports to MLflow too, not only their cards; as long as that takes at a run's end.",
        )
        register: str | None = machine(
            None, "Registered model of MLflow of which a finished run's export becomes a version; null: none."
        )
        alias: str | None = machine(
            None, "Alias of that version, for example champion; it moves there from an older one."
        )

        @field_validator("uri")
        @classmethod
        def _no_secret(cls, uri: str | None) -> str | None:
            if uri is not None and (secret := describe_secret_in_urls(uri)):
                raise ValueError(
                    f"the URI holds {secret}, which would stand in every config.yaml; write ${{A_VARIABLE}} for the URI"
                )
            return uri

        @model_validator(mode="after")
        def _alias_of_a_registered_model(self) -> Self:
            if self.register is not None and (not self.register.strip() or set(self.register) & set("/:")):
                raise ValueError(
                    f"register={self.register!r} is no name of a model in MLflow, which has neither / nor :"
                )
            if self.alias is not None:
                if self.register is None:
                    raise ValueError("alias is that of a registered model: name one with tracking.register")
                if (
                    not _ALIAS.fullmatch(self.alias)
                    or _VERSION_ALIAS.fullmatch(self.alias)
                    or self.alias.lower() == "latest"
                ):
                    raise ValueError(
                        f"alias={self.alias!r} is none for MLflow: letters, digits, _ and -, and neither latest nor v1"
                    )
            return self


class Tracker(Protocol):
    """Records the settings, metrics and files of an attempt. Only rank 0's does; the others have a ``NullTracker``."""

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str], changed: Sequence[str] = ()) -> None:
        """Log the resolved settings and the tags of an attempt that has begun.

        changed: names of the science settings with another value than their default, which readers look at first.
        """
        ...

    def log_rows(self, rows: Sequence[MetricRow]) -> None:
        """Log the rows of finished steps, in order; each row has its ``step``."""
        ...

    def log_results_once(self, results: MetricRow, step: int) -> None:
        """Log one row of an evaluation or of the finished run; a repeated row is not written twice."""
        ...

    def log_file(self, path: Path) -> None:
        """Log a complete file of the run directory: a picture, a config, a card."""
        ...

    def rewind(self, to_step: int) -> None:
        """Drop the rows after ``to_step``, which the run repeats after a roll-back."""
        ...

    def skip_flush(self) -> None:
        """Let ``close`` not wait for uploads: the next attempt or foveal track sync delivers the rest."""
        ...

    def close(self, state: AttemptState, reason: str = "") -> None:
        """Log the final state of this attempt and the reason, one sentence, and release all resources."""
        ...


def summarize_error(error: Exception) -> str:
    """Return a library's error in one line, without secrets."""
    text = " ".join(redact(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= _MAX_ERROR_LENGTH else f"{text[:_MAX_ERROR_LENGTH]} ..."


class NullTracker:
    """Tracker of the ranks that log nothing."""

    def log_settings(self, settings: dict[str, Any], tags: dict[str, str], changed: Sequence[str] = ()) -> None: ...
    def log_rows(self, rows: Sequence[MetricRow]) -> None: ...
    def log_results_once(self, results: MetricRow, step: int) -> None: ...
    def log_file(self, path: Path) -> None: ...
    def rewind(self, to_step: int) -> None: ...
    def skip_flush(self) -> None: ...
    def close(self, state: AttemptState, reason: str = "") -> None: ...
