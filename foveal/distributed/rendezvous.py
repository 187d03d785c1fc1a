"""Rendezvous: every rank of a run joins the run's store once; ranks of other runs are refused."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from typing import NoReturn

import torch.distributed as dist

from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import is_store_host, open_store, summarize_error
from foveal.errors import LaunchError, RankConflictError

_WARN_AFTER_SECONDS = 30.0  # a rank logs the number of missing ranks after this time
_POLL_SECONDS = 0.5  # between two reads of the store; the first few follow one another faster
_SERVER_EXIT_SECONDS = 4 * _POLL_SECONDS  # rank 0 serves the store this long after a failure, so that others read why
_GRACE = 20.0  # seconds for the run's own ranks to join after a rank of another run connected
_FAILURE_KEY = "ended"  # holds the reason for which the rendezvous failed
_log = logging.getLogger(__name__)


def join_rendezvous(
    launch_env: LaunchEnv, identity: RunIdentity, timeout_seconds: float, gpu_uuid: str = ""
) -> dist.Store:
    """Join the ranks of a run. Return their store once every rank has joined it exactly once.

    Sets MASTER_ADDR and MASTER_PORT to the store's address. ``gpu_uuid``: this rank's GPU; empty on a CPU.
    Raises, on every rank that joined: LaunchError if ranks are missing after ``timeout_seconds``; RankConflictError if
    ranks of different runs, or one rank twice, came to one address, or if two ranks have one GPU;
    AttemptSupersededError on a rank of an earlier attempt.
    """
    deadline = time.monotonic() + timeout_seconds
    store = open_store(launch_env, identity, timeout_seconds)
    try:
        _register_rank(store, launch_env, gpu_uuid)
        _wait_for_all_ranks(store, launch_env, timeout_seconds, deadline)
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise LaunchError(
            f"rank {launch_env.rank} connected to the ranks' store, but not all ranks joined it "
            f"({summarize_error(error)}); the log of rank 0 says why"
        ) from error
    except LaunchError:
        if is_store_host(launch_env):
            time.sleep(_SERVER_EXIT_SECONDS)
        raise
    return store


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ``rank 3`` or ``ranks 0-1, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(str(end) for end in span) for span in spans)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def _register_rank(store: dist.Store, launch_env: LaunchEnv, gpu_uuid: str) -> None:
    """Write this rank and its GPU into the store.

    Raises: RankConflictError if another process has joined as this rank, or another rank on this GPU.
    """
    process = f"process {os.getpid()} on {socket.gethostname()}"
    if store.add(f"times/{launch_env.rank}", 1) == 1:
        store.set(f"here/{launch_env.rank}", json.dumps({"host": socket.gethostname(), "process": process}))
        if gpu_uuid:
            _claim_gpu(store, launch_env.rank, gpu_uuid)
        store.add("came", 1)
        return
    first_process = json.loads(store.get(f"here/{launch_env.rank}"))["process"]
    sentence = (
        f"two processes came as rank {launch_env.rank} of {launch_env.world_size}, {first_process} and {process}: "
        f"start every rank once, and end what an earlier start has left"
    )
    _refuse_conflict(store, sentence)


def _claim_gpu(store: dist.Store, rank: int, gpu_uuid: str) -> None:
    """Write the rank of a GPU into the store, by one request. Raises: RankConflictError if it has another rank."""
    host = socket.gethostname()
    owner = store.compare_set(f"gpu/{host}/{gpu_uuid}", "", str(rank)).decode()
    if owner != str(rank):
        _refuse_conflict(
            store,
            f"{format_ranks((int(owner), rank))} are on one GPU, {gpu_uuid} of {host}: start as many tasks per node as "
            f"GPUs, and let each task see all GPUs of the node or one that no other task sees (CUDA_VISIBLE_DEVICES)",
        )


def _refuse_conflict(store: dist.Store, sentence: str) -> NoReturn:
    """Raise a RankConflictError on every rank of the rendezvous."""
    store.set(_FAILURE_KEY, json.dumps({"conflict": True, "sentence": sentence}))
    raise RankConflictError(sentence)


def _wait_for_all_ranks(store: dist.Store, launch_env: LaunchEnv, seconds: float, deadline: float) -> None:
    """Wait until every rank has joined. A poll reads two keys, whatever the number of ranks."""
    joined = store.add("came", 0)
    began, warned, stranger = time.monotonic(), False, ""
    while joined < launch_env.world_size:
        if store.check([_FAILURE_KEY]):
            failure = json.loads(store.get(_FAILURE_KEY))
            raise (RankConflictError if failure["conflict"] else LaunchError)(failure["sentence"])
        now = time.monotonic()
        if launch_env.rank == 0 and not stranger and store.check(["stranger"]):
            stranger, deadline = store.get("stranger").decode(), min(deadline, now + _GRACE)
        if now >= deadline:
            store.set(_FAILURE_KEY, json.dumps(_explain_timeout(store, launch_env.world_size, seconds, stranger)))
            continue
        if now - began > _WARN_AFTER_SECONDS and not warned:
            warned = True
            _log.warning("%d of %d ranks have joined; waiting for the others", joined, launch_env.world_size)
        time.sleep(min(_POLL_SECONDS, 0.02 + now - began))
        joined = store.add("came", 0)


def _explain_timeout(store: dist.Store, size: int, seconds: float, stranger: str) -> dict[str, object]:
    """Return the value of _FAILURE_KEY if ranks are missing. ``stranger``: the rank of another run that came, or ""."""
    absent = _describe_missing_ranks(store, size, None if stranger else seconds)
    if stranger:
        return {"conflict": True, "sentence": f"{stranger}, came to where this run meets, and {absent}"}
    return {"conflict": False, "sentence": f"{absent}: see why they did not start there, and start again"}


def _describe_missing_ranks(store: dist.Store, size: int, seconds: float | None) -> str:
    host_by_rank = {
        rank: json.loads(store.get(f"here/{rank}"))["host"] for rank in range(size) if store.check([f"here/{rank}"])
    }
    hosts = [
        f"{format_ranks(rank for rank in host_by_rank if host_by_rank[rank] == host)} on {host}"
        for host in dict.fromkeys(host_by_rank.values())
    ]
    time_limit = "" if seconds is None else f" within {seconds:.0f} s"
    return (
        f"{len(host_by_rank)} of {size} ranks came{time_limit} ({'; '.join(hosts)}), but not "
        f"{format_ranks(set(range(size)) - set(host_by_rank))}"
    )
