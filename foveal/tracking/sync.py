"""What a run directory holds, taken to a store: in order, and each number once, whatever fails on the way.

A row goes into one request whole, so that it has arrived or has not. What has arrived is the store's to say: after every
failure, and after every start, it is asked anew. Equal rows carry equal times, so that a request which was thought lost
and arrives after its repetition changes nothing in a store that keeps a point once.
"""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from foveal.tracking.tail import Tail, milliseconds, read_json, read_lines
from foveal.tracking.tracker import Point, Row

_NUMBERS = 1000  # in a request: the most that MLflow takes
_FILES = ("config.yaml", "settings.json", "finished.json", "export/card.json")
# These grow: they are sent at the run's end, and before when they have grown by a part, so that a run of any length sends
# no more than some times their size.
_TABLES = ("rollbacks.jsonl", "refused.jsonl", "quarantine.jsonl", "stragglers.jsonl")
_GROWN = 1.25

_ODD = re.compile(r"[^\w.\- :/]")


class Store(Protocol):
    """A run in a tracking store. Every verb may raise whatever the store's library raises."""

    @property
    def run(self) -> str:
        """What the store calls the run."""
        ...

    def newest(self) -> dict[str, int]:
        """The highest step of each name."""
        ...

    def held(self, name: str) -> dict[int, int]:
        """For each step with that name, when its newest number was made, in milliseconds."""
        ...

    def send(self, points: Sequence[Point]) -> None:
        """At most a thousand numbers, which arrive together or not at all."""
        ...

    def facts(self, settings: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Settings, tags and with them the state."""
        ...

    def files(self) -> dict[str, int]:
        """What is kept of the run's files: ``pictures/a.png`` to its bytes."""
        ...

    def file(self, path: Path, folder: str) -> None:
        """Keep a file, in a folder of the run's files or, where that is empty, beside them."""
        ...


class Superseded(Exception):
    """The run's rows are another attempt's now; this is no failure of the store."""


@dataclass
class Delivered:
    """Rows that were sent, rows that the store had, and files that were sent."""

    sent: int = 0
    there: int = 0
    files: int = 0


class Delivery:
    """From one run directory to one store. ``rows`` and ``files`` are one thread's, ``file`` and ``rewind`` another's."""

    def __init__(self, run: Path, tail: Tail, connect: Callable[[], Store]) -> None:
        self.count = Delivered()
        self._run, self._tail, self._connect = run, tail, connect
        self._store: Store | None = None
        self._known = self._searched = ""  # the store's run that has what was delivered, and whose files were compared
        self._told: Any = None
        self._asked = Asked({})
        self._went_back = False
        self._waiting: deque[Path] = deque()
        self._sizes: dict[Path, int] = {}  # of the tables as they were last sent

    def file(self, path: Path) -> None:
        """To be kept, whatever the store has of that name."""
        self._waiting.append(path)

    def rewind(self) -> None:
        """The file of rows was cut."""
        self._went_back = True
        self._tail.cut()

    def behind(self) -> int:
        """Rows that are not delivered yet."""
        return self._tail.behind()

    def forget(self) -> None:
        """After a failure: what has arrived is to be asked for."""
        self._store = None

    def rows(self) -> None:
        """Deliver settings, tags and rows. Errors: Superseded, and whatever the store raises; then ``forget``."""
        store = self._connected()
        if self._tags()["state"] == "running":
            self._tell(store)
        while (taken := self._tail.take(_NUMBERS)).rows:
            self._fence()
            if self._went_back:
                self._went_back, self._asked.voids = False, _voids(self._run)
            self._asked.meet(taken.rows)
            missing = [points for row in taken.rows if (points := self._asked.missing(row, store))]
            if missing:
                store.send([point for points in missing for point in points])
            self.count.sent += len(missing)
            self.count.there += len(taken.rows) - len(missing)
            self._tail.delivered(taken)
        self._tell(store)

    def files(self, *, last: bool) -> None:
        """Deliver files, the ``last`` time also those that have grown only a little. Errors: as for rows."""
        store = self._connected()
        if self._searched != self._known:
            self._waiting.extend(_kept(self._run, store.files()))
            self._searched, self._sizes = self._known, {}
        self._waiting.extend(self._grown(1.0 if last else _GROWN))
        while self._waiting:
            path = self._waiting[0]
            if path.exists():
                self._fence()
                store.file(path, _folder(path))
                self.count.files += 1
            self._waiting.popleft()

    def _grown(self, by: float) -> list[Path]:
        """The tables that are so many times as long as they were sent."""
        found = []
        for file in (self._run / name for name in _TABLES):
            size = file.stat().st_size if file.exists() else 0
            if size > by * self._sizes.get(file, 0) and file not in self._waiting:
                self._sizes[file] = size
                found.append(file)
        return found

    def close(self) -> None:
        """Read no more."""
        self._tail.close()

    def _connected(self) -> Store:
        self._fence()
        if self._store is None:
            store = self._connect()
            if store.run != self._known:  # the first time, or a store that lost it
                self._tail.again()
            self._asked = Asked(store.newest())
            self._known, self._told, self._went_back, self._store = store.run, None, True, store
        return self._store

    def _fence(self) -> None:
        if self._tail.superseded:
            raise Superseded

    def _tags(self) -> dict[str, str]:
        return read_json(self._run / "tags.json") or {"state": "running"}

    def _tell(self, store: Store) -> None:
        facts = read_json(self._run / "settings.json"), self._tags()
        if facts != self._told:
            store.facts(*facts)
            self._told = facts


class Asked:
    """What a store had when it was asked: as little is asked as decides about the rows that are to be delivered.

    Names that always come together arrived together: one of them is asked for. A point that was made before the run
    went back behind its step is void, and does not count. ``voids``: (milliseconds, the step gone back to).
    """

    def __init__(self, newest: Mapping[str, int]) -> None:
        self.voids: list[tuple[int, int]] = []
        self._newest, self._end = newest, max(newest.values(), default=-1)
        self._kinds: set[frozenset[str]] = set()
        self._speakers: dict[str, str] = {}
        self._held: dict[str, dict[int, int]] = {}

    def meet(self, rows: Sequence[Row]) -> None:
        """Learn which names come together."""
        kinds = {frozenset(_numbers(row)) for row in rows}
        if not kinds <= self._kinds:
            self._kinds |= kinds
            first: dict[tuple[Any, ...], str] = {}
            for name in sorted(set().union(*self._kinds)):
                company = frozenset(kind for kind in self._kinds if name in kind), self._newest.get(name)
                self._speakers[name] = first.setdefault(company, name)
        if rows[0]["step"] > self._end:
            self._held.clear()  # a long run has a million, and none is asked for again

    def missing(self, row: Row, store: Store) -> list[Point]:
        """Of a row what the store does not have. Errors: whatever the store raises."""
        step, made = int(row["step"]), milliseconds(row["time"])
        return [(name, value, made, step) for name, value in _numbers(row).items() if not self._has(name, step, store)]

    def _has(self, name: str, step: int, store: Store) -> bool:
        if self._newest.get(name, -1) < step:
            return False
        speaker = self._speakers[name]
        if speaker not in self._held:
            self._held[speaker] = store.held(speaker)
        made = self._held[speaker].get(step)
        return made is not None and made > max((when for when, to in self.voids if to < step), default=-1)


def _numbers(row: Row) -> dict[str, float]:
    """A row without its place and time, under names that any store takes: arms of a comparison are a user's words."""
    return {_ODD.sub("_", name): float(value) for name, value in row.items() if name not in ("step", "time")}


def _voids(run: Path) -> list[tuple[int, int]]:
    return [(milliseconds(entry["time"]), entry["to"]) for entry in read_lines(run / "rollbacks.jsonl")]


def _kept(run: Path, there: Mapping[str, int]) -> list[Path]:
    """The run's files that a store is to have: the small ones in any case, a picture if the store has none as large."""
    pictures = sorted(run.glob("pictures/*.png"))
    new = [each for each in pictures if there.get(f"pictures/{each.name}") != each.stat().st_size]
    return [run / name for name in _FILES] + sorted(run.glob("export/*/card.json")) + new


def _folder(path: Path) -> str:
    """Where a store keeps a file of the run: pictures, and cards of several exports, have a folder of their own."""
    several = path.name == "card.json" and path.parent.parent.name == "export"
    return path.parent.name if several or path.parent.name == "pictures" else ""
