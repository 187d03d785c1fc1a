"""Heartbeats: every rank writes its position into the ranks' store once a second; a stalled rank reads all of them."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from foveal.distributed.rendezvous import format_ranks
from foveal.distributed.tcp_store import StoreServerProbe, open_extra_store_connection, read_published
from foveal.distributed.world import World

LOST_PEER = "lost a peer"  # the exit reason of a rank that ended because another rank failed
_MAX_COMPARING_RANKS = (
    64  # only ranks below this read all heartbeats; a thousand readers of a thousand values overload the store
)
_MAX_LOCATIONS_SHOWN = 6  # groups of ranks in a sentence
_CONNECT_TIMEOUT_SECONDS = 30.0
_SILENT_AFTER_POLLS = 3  # a rank without a new heartbeat for this many polls is silent


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The position of a rank.

    ``idle_seconds``: time without progress of the training loop. ``poll_count``: polls of the rank's watchdog so far;
    -1 after the rank left. ``location``: function and line of the main thread; ``is_waiting``: whether that code waits
    for other ranks.
    """

    step: int
    activity: str
    idle_seconds: float
    poll_count: int
    host: str
    location: str
    is_waiting: bool


class HeartbeatExchange:
    """A thread that reads and writes heartbeats, so that a slow store blocks this thread only."""

    def __init__(
        self, world: World, poll_interval: float, read_heartbeat: Callable[[], Heartbeat], store_timeout: float = 7.0
    ) -> None:
        """Start the thread. ``store_timeout``: seconds for the store's answer, on top of the polls of a comparison."""
        self._rank, self._size, self._store_key = world.rank, world.size, world.store_key
        self._poll_interval, self._read_heartbeat, self._store_timeout = poll_interval, read_heartbeat, store_timeout
        self._closed = threading.Event()
        self._comparison_requested = threading.Event()
        self._comparison_finished = threading.Event()
        self._disconnected = False
        self._probe: StoreServerProbe
        self.suspect_nodes: set[str] = set()  # nodes of the ranks that the newest diagnosis blames
        self._diagnosis = self._exit_reason = ""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self, exit_reason: str) -> None:
        """Publish a last heartbeat with the reason why this rank leaves, and stop the thread."""
        self._exit_reason = exit_reason
        self._closed.set()
        self._thread.join(2 * self._poll_interval)

    def diagnose(self) -> str:
        """Compare the heartbeats of all ranks for a few polls. Return a sentence that names the ranks behind."""
        if self._rank >= _MAX_COMPARING_RANKS:
            return f"the logs of ranks 0-{_MAX_COMPARING_RANKS - 1} name the ranks that are behind"
        self._comparison_finished.clear()
        self._comparison_requested.set()
        finished = self._comparison_finished.wait(
            0 if self._disconnected else _SILENT_AFTER_POLLS * self._poll_interval + self._store_timeout
        )
        if finished and not self._disconnected:
            return self._diagnosis
        before = f"; before that: {self._diagnosis}" if self._diagnosis else ""
        if self._disconnected:
            return f"the store of the ranks, on the node of rank 0, is gone: the log of rank 0 says more{before}"
        return f"the store of the ranks, on the node of rank 0, does not answer: look at rank 0 first{before}"

    def _run(self) -> None:
        with (
            contextlib.suppress(dist.DistError, OSError),
            contextlib.closing(StoreServerProbe(_CONNECT_TIMEOUT_SECONDS)) as probe,
        ):
            self._probe = probe
            store = open_extra_store_connection(_CONNECT_TIMEOUT_SECONDS, self._store_key)
            self._publish(store, self._read_heartbeat())
            while not self._closed.wait(self._poll_interval):
                self._publish(store, self._read_heartbeat())
                if self._comparison_requested.is_set():
                    self._comparison_requested.clear()
                    self._compare_ranks(store)
            last = self._read_heartbeat()
            self._publish(store, Heartbeat(last.step, self._exit_reason, 0.0, -1, last.host, "", is_waiting=False))
        self._disconnected = True
        self._comparison_finished.set()

    def _publish(self, store: dist.Store, heartbeat: Heartbeat) -> None:
        if not self._probe.is_alive():
            raise ConnectionError
        store.set(f"beat/{self._rank}", json.dumps(asdict(heartbeat)))

    def _compare_ranks(self, store: dist.Store) -> None:
        before = self._read_all_heartbeats(store)
        for _ in range(_SILENT_AFTER_POLLS):
            self._closed.wait(self._poll_interval)
            self._publish(store, self._read_heartbeat())
        after = self._read_all_heartbeats(store)
        silent_ranks = {
            rank
            for rank, heartbeat in after.items()
            if rank in before and heartbeat.poll_count == before[rank].poll_count >= 0
        }
        self._diagnosis, blamed = diagnose_heartbeats(after, silent_ranks - {self._rank}, self._size)
        self.suspect_nodes = {heartbeat.host for heartbeat in blamed.values()}
        self._comparison_finished.set()

    def _read_all_heartbeats(self, store: dist.Store) -> dict[int, Heartbeat]:
        rank_by_key = {f"beat/{rank}": rank for rank in range(self._size)}
        published = read_published(store, list(rank_by_key))
        return {rank_by_key[key]: Heartbeat(**json.loads(text)) for key, text in published.items()}


def diagnose_heartbeats(
    heartbeat_by_rank: Mapping[int, Heartbeat], silent_ranks: Collection[int], world_size: int
) -> tuple[str, dict[int, Heartbeat]]:
    """Return a sentence about the ranks that are behind, and the heartbeats of the ranks that the sentence blames.

    The first that applies: ranks that left, never sent a heartbeat or are silent; ranks at an earlier step than others;
    ranks that work while others wait. Otherwise the sentence states the position of every rank and blames none.
    A rank that left because it lost a peer is never blamed.
    """
    left = {
        rank: beat for rank, beat in heartbeat_by_rank.items() if beat.poll_count < 0 and beat.activity != LOST_PEER
    }
    running = {rank: beat for rank, beat in heartbeat_by_rank.items() if beat.poll_count >= 0}
    missing = set(range(world_size)) - set(heartbeat_by_rank)
    silent = {rank: beat for rank, beat in running.items() if rank in silent_ranks}
    problems: list[str] = []
    if missing:
        problems.append(f"no heartbeat yet from {format_ranks(missing)}")
    if left:
        problems.append(_describe_locations(left))
    if silent:
        problems.append(
            f"{_describe_locations(silent)}, then silent (stopped, dead, or inside a C call that lets no Python run)"
        )
    if problems:
        return "; ".join(problems), left | silent
    newest = max(beat.step for beat in running.values())
    behind = {rank: beat for rank, beat in running.items() if beat.step < newest}
    if behind:
        return f"behind, while others are in step {newest}: {_describe_locations(behind)}", behind
    working = {rank: beat for rank, beat in running.items() if not beat.is_waiting}
    if working and len(working) < len(running):
        return f"the others wait for {_describe_locations(working)}", working
    return f"no rank is behind: {_describe_locations(running)}", {}


def _describe_locations(heartbeats: Mapping[int, Heartbeat]) -> str:
    """Return ``rank 3 on node2 in step 12: data (read, reader.py:88)``; ranks with equal text share one entry."""
    groups: dict[str, list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        location = f" ({heartbeat.location})" if heartbeat.location else ""
        text = f"on {heartbeat.host} in step {heartbeat.step}: {heartbeat.activity}{location}"
        groups.setdefault(text, []).append(rank)
    entries = [f"{format_ranks(ranks)} {text}" for text, ranks in sorted(groups.items(), key=lambda item: len(item[1]))]
    shown = entries[:_MAX_LOCATIONS_SHOWN]
    if len(entries) > _MAX_LOCATIONS_SHOWN:
        shown.append(f"and {len(entries) - _MAX_LOCATIONS_SHOWN} groups of ranks more")
    return "; ".join(shown)
