"""What a store says when its answer is no, as against one that does not answer."""

import errno
import json
from http import HTTPStatus
from typing import Any

from foveal.tracking.tracker import summarize_error

_PASSING = {408, 409, 423, 425, 429, 499}  # HTTP: what the next request need not meet
_FOR_GOOD = {errno.EACCES, errno.EPERM, errno.EROFS}
_GONE = (
    "RESOURCE_DOES_NOT_EXIST",
    "must be in the 'active' state",
)  # a run: another is made when the store is asked anew


class StoreRefusedError(Exception):
    """A store that answered no, in a sentence."""


def explain_refusal(error: Exception) -> str | None:
    """Why a store refused, in a sentence; nothing where it did not answer, or may answer otherwise the next time.

    The libraries of MLflow's stores are known by what their errors have, since whoever asks has not imported them.
    """
    if isinstance(error, StoreRefusedError):
        return str(error)
    said = str(error)
    if any(word in said for word in _GONE):
        return None
    if "database schema" in said or "Can't locate revision" in said:
        return (
            f"its tables are those of another MLflow ({summarize_error(error)}): after a backup `mlflow db upgrade` brings an older "
            f"store to the MLflow that is installed here, and a newer store wants the MLflow that made it"
        )
    if "_alembic_tmp_" in said:
        return (
            "its tables were left half made, by runs that made them at once or by a kill: move the file away, and `foveal "
            "track sync RUN` delivers a run to the next one"
        )
    if isinstance(error, OSError) and error.errno in _FOR_GOOD:
        return summarize_error(error)
    status = _http_status(error)
    return summarize_error(error) if status is not None and 400 <= status < 500 and status not in _PASSING else None


def _http_status(error: Any) -> int | None:
    """The HTTP status of an answer, as far as MLflow's, requests' or boto's error tells."""
    if type(error.__cause__).__module__.startswith("sqlalchemy"):
        return None  # a database's own, to which MLflow gives any status
    body = getattr(error, "json", None)
    if isinstance(body, dict) and "error_code" not in body:  # of a proxy or another server: the status is lost
        words = json.dumps(body).lower()
        return next((each.value for each in HTTPStatus if 400 <= each < 500 and each.phrase.lower() in words), None)
    if hasattr(error, "get_http_status_code"):
        return int(error.get_http_status_code())
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
