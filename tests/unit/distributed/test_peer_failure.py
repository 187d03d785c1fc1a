"""Recognition of a lost peer and of a launch that cannot work, and the settings of torch's flight recorder."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from foveal.distributed import peer_failure
from foveal.distributed.peer_failure import (
    abort_process_group,
    describe_peer_failure,
    diagnose_launch_mistake,
    dump_cpu_flight_recorder,
    enable_flight_recorder,
    set_flight_recorder_folder,
)
from foveal.distributed.world import init_world
from foveal.errors import FileLimitError, LaunchError

GLOO = "[/src/third_party/gloo/gloo/transport/tcp/"
NAMES = (
    *peer_failure._BUFFER_SIZE_VARIABLES,
    *peer_failure._DUMP_ON_TIMEOUT_VARIABLES,
    *peer_failure._DUMP_FILE_VARIABLES,
)


@pytest.fixture(autouse=True)
def no_recorder_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the recorder's variables; they are restored after the test."""
    for name in (*NAMES, "RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(f"{GLOO}pair.cc:561] Connection closed by peer [10.0.0.1]:1. This is typically caused by x."),
            "Connection closed by peer [10.0.0.1]:1",
        ),
        (RuntimeError(f"{GLOO}unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"), None),
        (RuntimeError("[Rank 0]: Rank 1 failed to pass monitoredBarrier in 4000 ms\n Original exception:"), None),
        (dist.DistBackendError("NCCL error in: /src/x.cpp:1, remote process exited"), "remote process exited"),
        (RuntimeError("NCCL Async Error: remote process exited \nNCCL Last Error: socket 7 is closed"), "socket 7 is"),
        (dist.DistNetworkError("Broken pipe"), "Broken pipe"),
        (dist.DistStoreError(""), "DistStoreError"),
    ],
)
def test_a_lost_peer_is_a_sentence(error: BaseException, reason: str | None) -> None:
    sentence = describe_peer_failure(error)
    assert sentence is not None
    assert sentence.startswith(f"rank 0 lost a peer in a collective: {reason or ''}")
    assert "\n" not in sentence and "/src/" not in sentence
    assert sentence.endswith("; the logs of the other ranks say which one stopped, and where")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("Connection closed by peer"), OSError("gloo/x.cc:1")]
)
def test_other_errors_are_not(error: BaseException) -> None:
    assert describe_peer_failure(error) is None


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (
            dist.DistBackendError("NCCL error in: /src/x.cpp:1, invalid usage\nncclInvalidUsage: This\nLast error:\n"),
            LaunchError,
            "NCCL refuses what rank 0 asks for: invalid usage; every rank needs a GPU of its own",
        ),
        (
            RuntimeError("NCCL allreduce failed: invalid argument (run with NCCL_DEBUG=WARN for details) \n"),
            LaunchError,
            "NCCL refuses what rank 0 asks for: NCCL allreduce failed: invalid argument",
        ),
        (OSError(errno.EMFILE, "Too many open files"), FileLimitError, " files that a process may open are in use: "),
        (RuntimeError(f"{GLOO}device.cc:9] socket: Too many open files"), FileLimitError, "raise the hard limit"),
    ],
)
def test_what_another_start_would_do_again_is_no_lost_peer(
    error: Exception, kind: type[LaunchError], sentence: str
) -> None:
    for link in (error, _raised_from(error)):
        mistake = diagnose_launch_mistake(link)
        assert mistake is not None and type(mistake) is kind and mistake.exit_code == 2
        assert sentence in str(mistake) and "\n" not in str(mistake)
        assert describe_peer_failure(link) is None
    for other in (OSError(errno.ENFILE, "Too many open files in system"), OSError("Too many open files"), KeyError()):
        assert diagnose_launch_mistake(other) is None


def test_without_a_group_there_is_nothing_to_leave() -> None:
    """Else "Default process group has not been initialized" would take the place of the error that ended the run."""
    assert not dist.is_initialized()
    abort_process_group()


def test_causes_of_an_error_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    cause = RuntimeError(f"{GLOO}pair.cc:1] Connection reset by peer")
    for error in (_raised_during(cause), _raised_from(cause)):
        assert (describe_peer_failure(error) or "").startswith("rank 3 lost a peer")
    suppressed = _raised_from(None, during=cause)
    assert describe_peer_failure(suppressed) is None
    cycle = RuntimeError("a")
    cycle.__cause__ = RuntimeError("b")
    cycle.__cause__.__cause__ = cycle
    assert describe_peer_failure(cycle) is None


def _raised_during(handled: BaseException) -> BaseException:
    try:
        try:
            raise handled
        except RuntimeError:
            raise KeyError("in the clean-up")  # noqa: B904 - the implicit context is tested
    except KeyError as error:
        return error


def _raised_from(cause: BaseException | None, during: BaseException | None = None) -> BaseException:
    try:
        try:
            raise during or RuntimeError("x")
        except RuntimeError:
            raise KeyError("y") from cause
    except KeyError as error:
        return error


def test_variables_of_the_user_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "17")  # the older name counts too
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/elsewhere/")
    enable_flight_recorder()
    set_flight_recorder_folder(tmp_path)
    variables = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert variables == {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "17",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def test_without_a_dump_file_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    dump_cpu_flight_recorder(0)
    assert not list(tmp_path.iterdir())


def test_every_group_gets_the_timeout_that_was_set() -> None:
    """Groups that a library creates without a timeout included: DeepSpeed reduces gradients in such a group."""

    def timeout_seconds(group: dist.ProcessGroup | None) -> float:
        assert group is not None
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    before = torch.distributed.distributed_c10d.default_pg_timeout
    with init_world(7.0):
        assert (timeout_seconds(dist.group.WORLD), timeout_seconds(dist.new_group([0]))) == (7.0, 7.0)  # type: ignore[arg-type]
    assert torch.distributed.distributed_c10d.default_pg_timeout == before
