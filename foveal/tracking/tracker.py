"""The tracker protocol and its twins without a server."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import field_validator

from foveal.config import Config, machine

Row = dict[str, float]
Status = Literal["FINISHED", "FAILED", "KILLED"]
_CREDENTIALS = re.compile(r"://[^/@\s]+@")
_log = logging.getLogger(__name__)


class TrackingConfig(Config):
    """Where MLflow's store is. The run directory's metrics.jsonl is written whatever stands here."""

    uri: str | None = machine(
        "sqlite:///runs/mlflow.db", "MLflow's tracking URI; a relative SQLite path starts here; none: no MLflow."
    )
    experiment: str = machine("foveal", "MLflow's experiment.")

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "the URI holds a password, which would stand in every config.yaml; write ${A_VARIABLE} for the URI"
            )
        return uri


class Tracker(Protocol):
    """What every tracker can do. Only rank 0 has one that does anything."""

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        """The resolved settings, and facts about this attempt."""
        ...

    def rows(self, rows: Sequence[Row]) -> None:
        """Finished steps, in order; each row has its ``step``."""
        ...

    def results(self, results: Row, step: int) -> None:
        """Numbers that only some steps have: an evaluation, or what came of the whole run."""
        ...

    def file(self, path: Path) -> None:
        """A file of the run directory worth keeping: a picture, a config, a card."""
        ...

    def close(self, status: Status) -> None:
        """The end of this attempt."""
        ...


def in_words(error: Exception) -> str:
    """A library's error without the user and password of a URL in it."""
    return f"{type(error).__name__}: {_CREDENTIALS.sub('://', str(error))}"


class Silent:
    """For the ranks that do not speak."""

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None: ...
    def rows(self, rows: Sequence[Row]) -> None: ...
    def results(self, results: Row, step: int) -> None: ...
    def file(self, path: Path) -> None: ...
    def close(self, status: Status) -> None: ...


class Both:
    """One tracker that must not fail, and one that may: training neither waits for nor dies of the second."""

    def __init__(self, sure: Tracker, unsure: Tracker) -> None:
        self._sure, self._unsure = sure, unsure

    def settings(self, flat: dict[str, Any], tags: dict[str, str]) -> None:
        self._sure.settings(flat, tags)
        self._try("settings", flat, tags)

    def rows(self, rows: Sequence[Row]) -> None:
        self._sure.rows(rows)
        self._try("rows", rows)

    def results(self, results: Row, step: int) -> None:
        self._sure.results(results, step)
        self._try("results", results, step)

    def file(self, path: Path) -> None:
        self._sure.file(path)
        self._try("file", path)

    def close(self, status: Status) -> None:
        self._sure.close(status)
        self._try("close", status)

    def _try(self, verb: str, *arguments: Any) -> None:
        try:
            getattr(self._unsure, verb)(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a tracking server does, it is not worth a run
            _log.warning("tracking: %s was not delivered (%s); metrics.jsonl has every number", verb, in_words(error))
