"""Telling a store that refuses a request from one that does not answer."""

import errno
import json
from http import HTTPStatus
from typing import Any

from foveal.tracking.tracker import summarize_error

_TRANSIENT_HTTP = {408, 409, 423, 425, 429, 499}  # the next request may succeed
_PERMANENT_ERRNO = {errno.EACCES, errno.EPERM, errno.EROFS}
# The run is gone: the next connection makes another.
_RUN_IS_GONE = ("RESOURCE_DOES_NOT_EXIST", "must be in the 'active' state")


class StoreRefusedError(Exception):
    """A store refused a request; the message is a sentence for the user."""


def explain_refusal(error: Exception) -> str | None:
    """Return why a store refused, in a sentence; None if it did not answer, or may answer differently the next time.

    Errors of the stores' libraries are recognised by their attributes, because the caller has not imported them.
    """
    if isinstance(error, StoreRefusedError):
        return str(error)
    text = str(error)
    if any(word in text for word in _RUN_IS_GONE):
        return None
    if "database schema" in text or "Can't locate revision" in text:
        return (
            f"its tables are those of another MLflow ({summarize_error(error)}): after a backup `mlflow db upgrade` brings an older "
            f"store to the MLflow that is installed here, and a newer store wants the MLflow that made it"
        )
    if "_alembic_tmp_" in text:
        return (
            "its tables were left half made, by runs that made them at once or by a kill: move the file away, and `foveal "
            "track sync RUN` delivers a run to the next one"
        )
    if isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO:
        return summarize_error(error)
    status = _http_status(error)
    return (
        summarize_error(error) if status is not None and 400 <= status < 500 and status not in _TRANSIENT_HTTP else None
    )


_NOT_IMPLEMENTED_HTTP = {405, 501}
_NO_SUCH_FEATURE = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "not supported by the store")


def explain_missing_feature(error: Exception) -> str | None:
    """Return why a store does not take a fact, in a sentence; None for a failure that may pass.

    Older servers answer an unknown request with 404 or 501, and a store of files with an error of Python.
    """
    if isinstance(error, AttributeError | TypeError) or _is_not_implemented(error):
        return f"this MLflow cannot do it ({summarize_error(error)})"
    return summarize_error(error) if _http_status(error) in _NOT_IMPLEMENTED_HTTP else explain_refusal(error)


def is_unknown_feature(error: Exception) -> bool:
    """Whether a store knows no facts of this kind, rather than that it does not take this one."""
    unknown = isinstance(error, StoreRefusedError) or _is_not_implemented(error)
    return unknown or _http_status(error) in _NOT_IMPLEMENTED_HTTP


def _is_not_implemented(error: Exception) -> bool:
    text = f"{getattr(error, 'error_code', '')} {error}"
    return isinstance(error, NotImplementedError) or any(word in text for word in _NO_SUCH_FEATURE)


def _http_status(error: Any) -> int | None:
    """Return the HTTP status in an error of MLflow, requests or boto, if it has one."""
    if type(error.__cause__).__module__.startswith("sqlalchemy"):
        return None  # a database error, to which MLflow assigns an arbitrary status
    body = getattr(error, "json", None)
    if isinstance(body, dict) and "error_code" not in body:  # a proxy's answer, which lost its status
        text = json.dumps(body).lower()
        return next(
            (status.value for status in HTTPStatus if 400 <= status < 500 and status.phrase.lower() in text), None
        )
    if hasattr(error, "get_http_status_code"):
        return int(error.get_http_status_code())
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)
