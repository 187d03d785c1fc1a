"""What happened in a run, as marks for its curves: attempts, refused updates, roll-backs, bad images."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveal.report.text import format_count
from foveal.runs.record import RunRecord

EventKind = Literal["attempt", "refused", "roll-back", "bad images"]
_MAX_EVENTS = 200  # of a kind; more are drawn as an even selection


@dataclass(frozen=True)
class Event:
    """Something that happened at a step. text: what a mark says."""

    step: int
    kind: EventKind
    text: str


@dataclass(frozen=True)
class Events:
    """The marks of a run by kind, and the number of each kind before the selection."""

    marks: Mapping[EventKind, tuple[Event, ...]]
    counts: Mapping[EventKind, int]

    def sentence(self) -> str:
        """Return what happened, in a sentence; "" for a run without incidents."""
        refused, rollbacks, bad = (self.counts.get(kind, 0) for kind in ("refused", "roll-back", "bad images"))
        parts = [
            format_count(self.counts.get("attempt", 0), "attempt") if self.counts.get("attempt", 0) > 1 else "",
            format_count(refused, "refused update") if refused else "",
            format_count(rollbacks, "roll-back") if rollbacks else "",
            f"{format_count(bad, 'image')} that did not decode" if bad else "",
        ]
        return ", ".join(filter(None, parts))


def read_events(record: RunRecord) -> Events:
    """Read what happened in a run. A line that is damaged is left out."""
    found: dict[EventKind, list[Event]] = {
        "attempt": [
            Event(attempt.start_step, "attempt", f"attempt {attempt.number} begins")
            for attempt in record.attempts
            if attempt.start_step is not None
        ],
        "refused": [
            Event(int(entry["step"]), "refused", "update refused: loss or gradients were not finite")
            for entry in read_lines(record.path / "refused.jsonl")
            if _is_number(entry.get("step"))
        ],
        "roll-back": [
            Event(_rollback_step(entry), "roll-back", f"rolled back to step {int(entry['to'])}")
            for entry in read_lines(record.path / "rollbacks.jsonl")
            if _is_number(entry.get("to"))
        ],
    }
    bad: dict[int, int] = {}
    for entry in read_lines(record.path / "quarantine.jsonl"):
        if _is_number(entry.get("step")):
            bad[int(entry["step"])] = bad.get(int(entry["step"]), 0) + 1
    found["bad images"] = [
        Event(step, "bad images", f"{format_count(number, 'image')} did not decode")
        for step, number in sorted(bad.items())
    ]
    counts: dict[EventKind, int] = {kind: len(events) for kind, events in found.items() if events}
    if bad:
        counts["bad images"] = sum(bad.values())
    return Events({kind: _select(events) for kind, events in found.items() if events}, counts)


def read_lines(
    file: Path, max_bytes: int | None = None, is_wanted: Callable[[bytes], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file of lines that may be missing; lines that are none are left out.

    max_bytes: of its end that are read at most. is_wanted: whether a line is parsed.
    """
    if not file.is_file():
        return
    with file.open("rb") as stream:
        if max_bytes is not None and (start := stream.seek(0, os.SEEK_END) - max_bytes) > 0:
            stream.seek(start - 1)
            stream.readline()  # the rest of a line that began before
        else:
            stream.seek(0)
        for line in stream:
            if is_wanted is not None and not is_wanted(line):
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def _rollback_step(entry: Mapping[str, Any]) -> int:
    """Return the last refused step, at which the run rolled back."""
    refused = [step for step in entry.get("refused") or () if _is_number(step)]
    return int(max(refused)) if refused else int(entry["to"])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # false for NaN


def _select(events: list[Event]) -> tuple[Event, ...]:
    if len(events) <= _MAX_EVENTS:
        return tuple(events)
    return tuple(events[round(at * (len(events) - 1) / (_MAX_EVENTS - 1))] for at in range(_MAX_EVENTS))
