"""Where every rank is, in the store in which they met: each says it once a second, and reads the others when it stalls."""

import contextlib
import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from foveal.distributed.rendezvous import ranks_in_words
from foveal.distributed.tcp_store import Lifeline, connect
from foveal.distributed.world import World

LOST = "lost a peer"  # how a rank leaves that another one failed
_COMPARE = 64  # the first so many ranks read everybody's beats; a thousand that did would drown the store
_SHOWN = 6  # places in a sentence
_CONNECTING = 30.0  # seconds
_HEARD = 3  # looks in which a rank must have said something new, or it is silent


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is: ``quiet`` seconds without a sign from its loop, at its look number ``looks``.

    ``place`` is where its main thread stands, and ``waits`` whether that is among what waits for other ranks.
    """

    step: int
    doing: str
    quiet: float
    looks: int
    host: str
    place: str
    waits: bool


class Beats:
    """A thread that speaks with the store, and may be kept waiting by it: nobody else is."""

    def __init__(self, world: World, look: float, mine: Callable[[], Beat], answering: float = 7.0) -> None:
        """``answering``: seconds beyond the looks of a comparison that the store may take to answer."""
        self._rank, self._size, self._key = world.rank, world.size, world.key
        self._look, self._mine, self._answering = look, mine, answering
        self._over = threading.Event()
        self._asked = threading.Event()
        self._answered = threading.Event()
        self._cut_off = False
        self._line: Lifeline
        self.suspects: set[str] = set()  # the nodes of those whom the newest verdict blames
        self._verdict = self._last = ""
        self._thread = threading.Thread(target=self._speak, name="watch-beats", daemon=True)
        self._thread.start()

    def close(self, how: str) -> None:
        """The last beat says how this rank left."""
        self._last = how
        self._over.set()
        self._thread.join(2 * self._look)

    def compare(self) -> str:
        """Who is behind, and in what: a sentence, after a few looks."""
        if self._rank >= _COMPARE:
            return f"who is behind stands in the logs of ranks 0-{_COMPARE - 1}"
        self._answered.clear()
        self._asked.set()
        answered = self._answered.wait(0 if self._cut_off else _HEARD * self._look + self._answering)
        if answered and not self._cut_off:
            return self._verdict
        before = f"; before that: {self._verdict}" if self._verdict else ""
        if self._cut_off:
            return f"the store of the ranks, on the node of rank 0, is gone: the log of rank 0 says more{before}"
        return f"the store of the ranks, on the node of rank 0, does not answer: look at rank 0 first{before}"

    def _speak(self) -> None:
        with contextlib.suppress(dist.DistError, OSError), contextlib.closing(Lifeline(_CONNECTING)) as line:
            self._line = line
            store = connect(_CONNECTING, self._key)
            self._say(store, self._mine())
            while not self._over.wait(self._look):
                self._say(store, self._mine())
                if self._asked.is_set():
                    self._asked.clear()
                    self._listen(store)
            now = self._mine()
            self._say(store, Beat(now.step, self._last, 0.0, -1, now.host, "", waits=False))
        self._cut_off = True
        self._answered.set()

    def _say(self, store: dist.Store, beat: Beat) -> None:
        if not self._line.holds():
            raise ConnectionError
        store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _listen(self, store: dist.Store) -> None:
        first = self._read(store)
        for _ in range(_HEARD):
            self._over.wait(self._look)
            self._say(store, self._mine())
        beats = self._read(store)
        silent = {rank for rank, beat in beats.items() if rank in first and beat.looks == first[rank].looks >= 0}
        self._verdict, accused = accusation(beats, silent - {self._rank}, self._size)
        self.suspects = {beat.host for beat in accused.values()}
        self._answered.set()

    def _read(self, store: dist.Store) -> dict[int, Beat]:
        names = {rank: f"beat/{rank}" for rank in range(self._size)}
        there = [rank for rank, name in names.items() if store.check([name])]
        return {rank: Beat(**json.loads(store.get(names[rank]))) for rank in there}


def accusation(beats: Mapping[int, Beat], silent: Collection[int], size: int) -> tuple[str, dict[int, Beat]]:
    """Who is behind, and in what: one sentence, and the ranks that it blames.

    In this order: who is gone or was not heard of, who is silent, who is at an earlier step than others, who works while
    others wait for it; and where everybody is, if none of these tells. Who left because it lost another is not to blame.
    """
    gone = {rank: beat for rank, beat in beats.items() if beat.looks < 0 and beat.doing != LOST}
    here = {rank: beat for rank, beat in beats.items() if beat.looks >= 0}
    missing = set(range(size)) - set(beats)
    mute = {rank: beat for rank, beat in here.items() if rank in silent}
    found = [f"nothing was heard yet of {ranks_in_words(missing)}"] if missing else []
    found += [f"{_where(gone)}"] if gone else []
    found += (
        [f"{_where(mute)}, then silent (stopped, dead, or inside a C call that lets no Python run)"] if mute else []
    )
    if found:
        return "; ".join(found), gone | mute
    newest = max(beat.step for beat in here.values())
    behind = {rank: beat for rank, beat in here.items() if beat.step < newest}
    if behind:
        return f"behind, while others are in step {newest}: {_where(behind)}", behind
    working = {rank: beat for rank, beat in here.items() if not beat.waits}
    if working and len(working) < len(here):
        return f"the others wait for {_where(working)}", working
    return f"no rank is behind: {_where(here)}", {}


def _where(beats: Mapping[int, Beat]) -> str:
    """``rank 3 on node2 in step 12: data (read, reader.py:88)``; ranks that say the same are said together."""
    groups: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        place = f" ({beat.place})" if beat.place else ""
        groups.setdefault(f"on {beat.host} in step {beat.step}: {beat.doing}{place}", []).append(rank)
    shown = [f"{ranks_in_words(ranks)} {text}" for text, ranks in sorted(groups.items(), key=lambda item: len(item[1]))]
    more = [f"and {len(shown) - _SHOWN} groups of ranks more"] if len(shown) > _SHOWN else []
    return "; ".join(shown[:_SHOWN] + more)
