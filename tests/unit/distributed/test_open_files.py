"""The limit of open files: rank 0 holds three connections of every rank."""

import contextlib
import errno
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from ports import free_port

from foveal.distributed import tcp_store
from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.open_files import raise_open_file_limit
from foveal.distributed.rendezvous import join_rendezvous
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import StoreServerProbe
from foveal.errors import FileLimitError

_RANKS, _FREE_FILES = 30, 64


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A soft limit with room for 64 files more, and an address of ranks started by hand."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + _FREE_FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def join(rank: int, seconds: float = 60.0) -> dist.Store:
    return join_rendezvous(LaunchEnv(rank, _RANKS, rank, "environment"), identity(), seconds)


def identity() -> RunIdentity:
    return RunIdentity({"launcher": "environment"}, _RANKS)


def test_more_ranks_than_the_soft_limit_has_room_for_meet() -> None:
    raise_open_file_limit()
    with ThreadPoolExecutor(_RANKS) as threads, contextlib.ExitStack() as connections:
        stores = list(threads.map(join, range(_RANKS)))
        for _ in range(_RANKS):  # as heartbeats do
            connections.enter_context(contextlib.closing(StoreServerProbe(60.0)))
            stores.append(tcp_store.open_extra_store_connection(60.0, identity().store_key))
        assert stores[-1].add("came", 0) == _RANKS


def test_too_few_files_are_a_sentence_before_ranks_wait_for_one_another() -> None:
    started = time.monotonic()
    with pytest.raises(FileLimitError) as caught:
        join(0)
    assert time.monotonic() - started < 30  # of the 60 s that it waits for the others
    assert caught.value.exit_code == 2, "another start would need as many: no requeue"
    sentence = r"rank 0 on \S+ may open \d+ files, and 30 ranks have 90 connections to it: raise the .* to 1114"
    assert re.fullmatch(sentence, str(caught.value))


_AGENT = """
import resource, subprocess, sys
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
rank = "from foveal.distributed.open_files import check_agent_connections; check_agent_connections(30)"
ended = subprocess.run([sys.executable, "-c", rank], stderr=subprocess.PIPE, text=True)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], ended.stderr.strip().rpartition(chr(10))[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the limits of another process")
def test_a_rank_raises_the_soft_limit_of_torchruns_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    said = [
        subprocess.run([sys.executable, "-c", _AGENT, "40", hard], capture_output=True, text=True, check=True).stdout
        for hard in ("120", "80")
    ]
    assert said[0].strip() == "120", "the connections of 30 ranks fit"
    sentence = r"80 .*FileLimitError: torchrun on \S+ may open 80 files, and 30 ranks have 90 connections to it: .*\n"
    assert re.fullmatch(sentence, said[1])


def test_a_rank_without_a_free_descriptor_does_not_call_rank_0_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_connection(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(FileLimitError, match="files that a process may open are in use: raise the hard limit"):
        join(1)
