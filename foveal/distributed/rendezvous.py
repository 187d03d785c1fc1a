"""Where the ranks of one run come together: every rank once, and none of another run."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterable

import torch.distributed as dist

from foveal.distributed.launcher import Seat
from foveal.distributed.run_identity import RunIdentity
from foveal.distributed.tcp_store import in_short, open_store, serves
from foveal.errors import LaunchError, RankConflict

_PATIENT = 30.0  # seconds before a rank says whom it is waiting for
_LOOKS = 0.5  # seconds between two looks, once the first few were quick
_LINGERS = 4 * _LOOKS  # seconds that the server stays after giving up, so that the others read why
_GRACE = 20.0  # seconds that a run's own ranks have after one of another run has come in their place
_ENDED = "ended"  # the word that says why nobody waits any longer
_log = logging.getLogger(__name__)


def meet(here: Seat, run: RunIdentity, seconds: float) -> dist.Store:
    """Bring the ranks of a run together, and return their store once every rank has come to it, once.

    MASTER_ADDR and MASTER_PORT are set to where that was.
    Errors, on every rank that did come: LaunchError after ``seconds`` at most, with the ranks that did not; RankConflict
    where ranks of different runs, or two of one number, came to one address; Superseded where an earlier attempt did.
    """
    deadline = time.monotonic() + seconds
    store = open_store(here, run, seconds)
    try:
        _come(store, here)
        _gather(store, here, seconds, deadline)
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        raise LaunchError(
            f"rank {here.rank} found the ranks' store, but they did not meet there ({in_short(error)}); the log of rank 0 says why"
        ) from error
    except LaunchError:
        if serves(here):
            time.sleep(_LINGERS)
        raise
    return store


def ranks_in_words(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-1, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(str(end) for end in run) for run in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def _come(store: dist.Store, here: Seat) -> None:
    """Say that this rank is here, where nobody has said so before. Errors: RankConflict."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if store.add(f"times/{here.rank}", 1) == 1:
        store.set(f"here/{here.rank}", json.dumps({"host": socket.gethostname(), "process": me}))
        store.add("came", 1)
        return
    other = json.loads(store.get(f"here/{here.rank}"))["process"]
    sentence = (
        f"two processes came as rank {here.rank} of {here.size}, {other} and {me}: start every rank once, and end what an "
        f"earlier start has left"
    )
    store.set(_ENDED, json.dumps({"conflict": True, "sentence": sentence}))
    raise RankConflict(sentence)


def _gather(store: dist.Store, here: Seat, seconds: float, deadline: float) -> None:
    """Wait for everybody. A rank asks for two words at a time, whatever the number of ranks."""
    came, began, warned, stranger = store.add("came", 0), time.monotonic(), False, ""
    while came < here.size:
        if store.check([_ENDED]):
            ended = json.loads(store.get(_ENDED))
            raise (RankConflict if ended["conflict"] else LaunchError)(ended["sentence"])
        now = time.monotonic()
        if here.rank == 0 and not stranger and store.check(["stranger"]):
            stranger, deadline = store.get("stranger").decode(), min(deadline, now + _GRACE)
        if now >= deadline:
            store.set(_ENDED, json.dumps(_end(store, here.size, seconds, stranger)))
            continue
        if now - began > _PATIENT and not warned:
            warned = True
            _log.warning("%d of %d ranks have come; the others are waited for", came, here.size)
        time.sleep(min(_LOOKS, 0.02 + now - began))
        came = store.add("came", 0)


def _end(store: dist.Store, size: int, seconds: float, stranger: str) -> dict[str, object]:
    """Why the ranks do not go on without those that did not come."""
    absent = _absent(store, size, None if stranger else seconds)
    if stranger:
        return {"conflict": True, "sentence": f"{stranger}, came to where this run meets, and {absent}"}
    return {"conflict": False, "sentence": f"{absent}: see why they did not start there, and start again"}


def _absent(store: dist.Store, size: int, seconds: float | None) -> str:
    here = {
        rank: json.loads(store.get(f"here/{rank}"))["host"] for rank in range(size) if store.check([f"here/{rank}"])
    }
    hosts = [
        f"{ranks_in_words(rank for rank in here if here[rank] == host)} on {host}"
        for host in dict.fromkeys(here.values())
    ]
    time_given = "" if seconds is None else f" within {seconds:.0f} s"
    return (
        f"{len(here)} of {size} ranks came{time_given} ({'; '.join(hosts)}), but not "
        f"{ranks_in_words(set(range(size)) - set(here))}"
    )
