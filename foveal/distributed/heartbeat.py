"""Where every rank is, in the store in which they met: each says it once a second, and reads the others when it stalls."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from foveal.distributed.rendezvous import format_ranks
from foveal.distributed.tcp_store import ServerProbe, connect_to_store
from foveal.distributed.world import World

LOST_PEER = "lost a peer"  # how a rank leaves that another one failed
_MAX_COMPARING_RANKS = 64  # the first so many ranks read everybody's beats; a thousand that did would drown the store
_MAX_LOCATIONS_SHOWN = 6  # places in a sentence
_CONNECT_TIMEOUT_SECONDS = 30.0  # seconds
_SILENT_AFTER_POLLS = 3  # looks in which a rank must have said something new, or it is silent


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where a rank is: ``quiet`` seconds without a sign from its loop, at its look number ``looks``.

    ``place`` is where its main thread stands, and ``waits`` whether that is among what waits for other ranks.
    """

    step: int
    activity: str
    idle_seconds: float
    poll_count: int
    host: str
    location: str
    is_waiting: bool


class HeartbeatExchange:
    """A thread that speaks with the store, and may be kept waiting by it: nobody else is."""

    def __init__(
        self, world: World, poll_interval: float, read_heartbeat: Callable[[], Heartbeat], store_timeout: float = 7.0
    ) -> None:
        """``answering``: seconds beyond the looks of a comparison that the store may take to answer."""
        self._rank, self._size, self._key = world.rank, world.size, world.store_key
        self._look, self._mine, self._answering = poll_interval, read_heartbeat, store_timeout
        self._over = threading.Event()
        self._asked = threading.Event()
        self._answered = threading.Event()
        self._cut_off = False
        self._line: ServerProbe
        self.suspect_nodes: set[str] = set()  # the nodes of those whom the newest verdict blames
        self._verdict = self._last = ""
        self._thread = threading.Thread(target=self._run, name="watch-beats", daemon=True)
        self._thread.start()

    def close(self, exit_reason: str) -> None:
        """The last beat says how this rank left."""
        self._last = exit_reason
        self._over.set()
        self._thread.join(2 * self._look)

    def diagnose(self) -> str:
        """Who is behind, and in what: a sentence, after a few looks."""
        if self._rank >= _MAX_COMPARING_RANKS:
            return f"who is behind stands in the logs of ranks 0-{_MAX_COMPARING_RANKS - 1}"
        self._answered.clear()
        self._asked.set()
        answered = self._answered.wait(0 if self._cut_off else _SILENT_AFTER_POLLS * self._look + self._answering)
        if answered and not self._cut_off:
            return self._verdict
        before = f"; before that: {self._verdict}" if self._verdict else ""
        if self._cut_off:
            return f"the store of the ranks, on the node of rank 0, is gone: the log of rank 0 says more{before}"
        return f"the store of the ranks, on the node of rank 0, does not answer: look at rank 0 first{before}"

    def _run(self) -> None:
        with (
            contextlib.suppress(dist.DistError, OSError),
            contextlib.closing(ServerProbe(_CONNECT_TIMEOUT_SECONDS)) as line,
        ):
            self._line = line
            store = connect_to_store(_CONNECT_TIMEOUT_SECONDS, self._key)
            self._publish(store, self._mine())
            while not self._over.wait(self._look):
                self._publish(store, self._mine())
                if self._asked.is_set():
                    self._asked.clear()
                    self._compare_ranks(store)
            now = self._mine()
            self._publish(store, Heartbeat(now.step, self._last, 0.0, -1, now.host, "", is_waiting=False))
        self._cut_off = True
        self._answered.set()

    def _publish(self, store: dist.Store, beat: Heartbeat) -> None:
        if not self._line.is_alive():
            raise ConnectionError
        store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _compare_ranks(self, store: dist.Store) -> None:
        first = self._read_heartbeats(store)
        for _ in range(_SILENT_AFTER_POLLS):
            self._over.wait(self._look)
            self._publish(store, self._mine())
        beats = self._read_heartbeats(store)
        silent = {
            rank for rank, beat in beats.items() if rank in first and beat.poll_count == first[rank].poll_count >= 0
        }
        self._verdict, accused = diagnose_heartbeats(beats, silent - {self._rank}, self._size)
        self.suspect_nodes = {beat.host for beat in accused.values()}
        self._answered.set()

    def _read_heartbeats(self, store: dist.Store) -> dict[int, Heartbeat]:
        names = {rank: f"beat/{rank}" for rank in range(self._size)}
        there = [rank for rank, name in names.items() if store.check([name])]
        return {rank: Heartbeat(**json.loads(store.get(names[rank]))) for rank in there}


def diagnose_heartbeats(
    heartbeats: Mapping[int, Heartbeat], silent_ranks: Collection[int], world_size: int
) -> tuple[str, dict[int, Heartbeat]]:
    """Who is behind, and in what: one sentence, and the ranks that it blames.

    In this order: who is gone or was not heard of, who is silent, who is at an earlier step than others, who works while
    others wait for it; and where everybody is, if none of these tells. Who left because it lost another is not to blame.
    """
    gone = {rank: beat for rank, beat in heartbeats.items() if beat.poll_count < 0 and beat.activity != LOST_PEER}
    here = {rank: beat for rank, beat in heartbeats.items() if beat.poll_count >= 0}
    missing = set(range(world_size)) - set(heartbeats)
    mute = {rank: beat for rank, beat in here.items() if rank in silent_ranks}
    found = [f"nothing was heard yet of {format_ranks(missing)}"] if missing else []
    found += [f"{_describe_locations(gone)}"] if gone else []
    found += (
        [f"{_describe_locations(mute)}, then silent (stopped, dead, or inside a C call that lets no Python run)"]
        if mute
        else []
    )
    if found:
        return "; ".join(found), gone | mute
    newest = max(beat.step for beat in here.values())
    behind = {rank: beat for rank, beat in here.items() if beat.step < newest}
    if behind:
        return f"behind, while others are in step {newest}: {_describe_locations(behind)}", behind
    working = {rank: beat for rank, beat in here.items() if not beat.is_waiting}
    if working and len(working) < len(here):
        return f"the others wait for {_describe_locations(working)}", working
    return f"no rank is behind: {_describe_locations(here)}", {}


def _describe_locations(beats: Mapping[int, Heartbeat]) -> str:
    """``rank 3 on node2 in step 12: data (read, reader.py:88)``; ranks that say the same are said together."""
    groups: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        place = f" ({beat.location})" if beat.location else ""
        groups.setdefault(f"on {beat.host} in step {beat.step}: {beat.activity}{place}", []).append(rank)
    shown = [f"{format_ranks(ranks)} {text}" for text, ranks in sorted(groups.items(), key=lambda item: len(item[1]))]
    more = (
        [f"and {len(shown) - _MAX_LOCATIONS_SHOWN} groups of ranks more"] if len(shown) > _MAX_LOCATIONS_SHOWN else []
    )
    return "; ".join(shown[:_MAX_LOCATIONS_SHOWN] + more)
