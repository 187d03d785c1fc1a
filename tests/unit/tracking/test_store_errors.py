"""What of a store's errors is an answer, and what is silence."""

from types import SimpleNamespace

from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INVALID_PARAMETER_VALUE

from foveal.tracking.store_errors import StoreRefusedError, explain_missing_feature, explain_refusal, is_unknown_feature


class HTTPError(OSError):
    """As requests has it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error")
        self.response = SimpleNamespace(status_code=status)


class ClientError(Exception):
    """As boto has it."""

    response = {"ResponseMetadata": {"HTTPStatusCode": 403}}  # noqa: RUF012


def test_what_is_an_answer() -> None:
    silent = [HTTPError(status) for status in (408, 429, 500, 503)]
    silent += [ConnectionError("no route"), MlflowException("RESOURCE_DOES_NOT_EXIST: no run"), OSError(5, "I/O")]
    silent += [
        MlflowException("The run 1 must be in the 'active' state. Current state is deleted.", INVALID_PARAMETER_VALUE)
    ]
    silent += [RestException({"message": "Service Unavailable"}), MlflowException("timed out")]
    assert [explain_refusal(error) for error in silent] == [None] * len(silent)
    for error, words in {
        HTTPError(403): "403 Client Error",
        ClientError("no bucket"): "no bucket",
        MlflowException("no such name", INVALID_PARAMETER_VALUE): "no such name",
        RestException({"error_code": "PERMISSION_DENIED", "message": "not yours"}): "not yours",
        RestException({"detail": "Not Found"}): "Not Found",
        PermissionError(13, "Permission denied"): "Permission denied",
        OSError(30, "Read-only file system"): "Read-only file system",
        MlflowException("Detected out-of-date database schema (found version b"): "`mlflow db upgrade`",
        ValueError("table _alembic_tmp_experiments already exists"): "move the file away",
        StoreRefusedError("experiment x is deleted: restore it"): "experiment x is deleted",
    }.items():
        assert words in (explain_refusal(error) or ""), error


def test_what_a_store_knows_nothing_of() -> None:
    unknown = [NotImplementedError("no"), MlflowException("404", ENDPOINT_NOT_FOUND), HTTPError(501)]
    refused = [HTTPError(403), MlflowException("bad name", INVALID_PARAMETER_VALUE), TypeError("no number")]
    assert all(explain_missing_feature(error) for error in unknown + refused)
    assert [is_unknown_feature(error) for error in unknown + refused] == [True] * 3 + [False] * 3
