"""Where the ranks of one run come together: every rank once, and none of another run."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterable

import torch.distributed as dist

from foveal.distributed.launcher import LaunchEnv
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import is_store_host, open_store, summarize_error
from foveal.errors import LaunchError, RankConflictError

_WARN_AFTER_SECONDS = 30.0  # seconds before a rank says whom it is waiting for
_POLL_SECONDS = 0.5  # seconds between two looks, once the first few were quick
_SERVER_EXIT_SECONDS = 4 * _POLL_SECONDS  # seconds that the server stays after giving up, so that the others read why
_GRACE = 20.0  # seconds that a run's own ranks have after one of another run has come in their place
_FAILURE_KEY = "ended"  # the word that says why nobody waits any longer
_log = logging.getLogger(__name__)


def join_rendezvous(launch_env: LaunchEnv, identity: RunIdentity, timeout_seconds: float) -> dist.Store:
    """Bring the ranks of a run together, and return their store once every rank has come to it, once.

    MASTER_ADDR and MASTER_PORT are set to where that was.
    Errors, on every rank that did come: LaunchError after ``seconds`` at most, with the ranks that did not; RankConflict
    where ranks of different runs, or two of one number, came to one address; Superseded where an earlier attempt did.
    """
    deadline = time.monotonic() + timeout_seconds
    store = open_store(launch_env, identity, timeout_seconds)
    try:
        _register_rank(store, launch_env)
        _wait_for_all_ranks(store, launch_env, timeout_seconds, deadline)
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise LaunchError(
            f"rank {launch_env.rank} found the ranks' store, but they did not meet there ({summarize_error(error)}); the log of rank 0 says why"
        ) from error
    except LaunchError:
        if is_store_host(launch_env):
            time.sleep(_SERVER_EXIT_SECONDS)
        raise
    return store


def format_ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-1, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(end) for end in run) for run in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def _register_rank(store: dist.Store, launch_env: LaunchEnv) -> None:
    """Say that this rank is here, where nobody has said so before. Raises: RankConflict."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if store.add(f"times/{launch_env.rank}", 1) == 1:
        store.set(f"here/{launch_env.rank}", json.dumps({"host": socket.gethostname(), "process": me}))
        store.add("came", 1)
        return
    other = json.loads(store.get(f"here/{launch_env.rank}"))["process"]
    sentence = (
        f"two processes came as rank {launch_env.rank} of {launch_env.world_size}, {other} and {me}: start every rank once, and end what an "
        f"earlier start has left"
    )
    store.set(_FAILURE_KEY, json.dumps({"conflict": True, "sentence": sentence}))
    raise RankConflictError(sentence)


def _wait_for_all_ranks(store: dist.Store, launch_env: LaunchEnv, seconds: float, deadline: float) -> None:
    """Wait for everybody. A rank asks for two words at a time, whatever the number of ranks."""
    came, began, warned, stranger = store.add("came", 0), time.monotonic(), False, ""
    while came < launch_env.world_size:
        if store.check([_FAILURE_KEY]):
            ended = json.loads(store.get(_FAILURE_KEY))
            raise (RankConflictError if ended["conflict"] else LaunchError)(ended["sentence"])
        now = time.monotonic()
        if launch_env.rank == 0 and not stranger and store.check(["stranger"]):
            stranger, deadline = store.get("stranger").decode(), min(deadline, now + _GRACE)
        if now >= deadline:
            store.set(_FAILURE_KEY, json.dumps(_explain_timeout(store, launch_env.world_size, seconds, stranger)))
            continue
        if now - began > _WARN_AFTER_SECONDS and not warned:
            warned = True
            _log.warning("%d of %d ranks have come; the others are waited for", came, launch_env.world_size)
        time.sleep(min(_POLL_SECONDS, 0.02 + now - began))
        came = store.add("came", 0)


def _explain_timeout(store: dist.Store, size: int, seconds: float, stranger: str) -> dict[str, object]:
    """Why the ranks do not go on without those that did not come."""
    absent = _describe_missing_ranks(store, size, None if stranger else seconds)
    if stranger:
        return {"conflict": True, "sentence": f"{stranger}, came to where this run meets, and {absent}"}
    return {"conflict": False, "sentence": f"{absent}: see why they did not start there, and start again"}


def _describe_missing_ranks(store: dist.Store, size: int, seconds: float | None) -> str:
    here = {
        rank: json.loads(store.get(f"here/{rank}"))["host"] for rank in range(size) if store.check([f"here/{rank}"])
    }
    hosts = [
        f"{format_ranks(rank for rank in here if here[rank] == host)} on {host}"
        for host in dict.fromkeys(here.values())
    ]
    time_given = "" if seconds is None else f" within {seconds:.0f} s"
    return (
        f"{len(here)} of {size} ranks came{time_given} ({'; '.join(hosts)}), but not "
        f"{format_ranks(set(range(size)) - set(here))}"
    )
