"""A store in memory that a test can break before and after it carries out what it is asked."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fake_facts import KeptFacts
from points import Numbers

from foveal.tracking.jsonl import JsonlTracker
from foveal.tracking.sync_facts import RemoteFacts
from foveal.tracking.tracker import MetricPoint


class Kept:
    """What a store keeps of one run, and what happens to a request before and after it is carried out."""

    def __init__(self) -> None:
        self.run_id = "1"
        self.points: list[MetricPoint] = []
        self.settings: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        self.artifacts: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.written: list[JsonlTracker] = []
        self.requests: list[int] = []
        self.before: Callable[[str], object] = lambda _: None
        self.after: Callable[[str], object] = lambda _: None
        self.facts: RemoteFacts = KeptFacts()

    def connected(self) -> "Kept":
        self._carried_out("connect", lambda: None)
        return self

    def get_latest_steps(self) -> dict[str, int]:
        return {name: max(step for other, _, _, step in self.points if other == name) for name, *_ in self.points}

    def get_step_timestamps(self, metric_name: str) -> dict[int, int]:
        self.asked.append(metric_name)
        made: dict[int, int] = {}
        for other, _, when, step in self.points:
            if other == metric_name:
                made[step] = max(when, made.get(step, 0))
        return made

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        self.requests.append(len(points))
        self._carried_out("send", lambda: self.points.extend(points))

    def set_params_tags_status(
        self, settings: Mapping[str, Any], tags: Mapping[str, str], changed: Sequence[str] | None = None
    ) -> None:
        self._carried_out("facts", lambda: (self.settings.update(settings), self.tags.update(tags)))

    def list_files(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.artifacts.items()}

    def upload_file(self, path: Path, remote_folder: str) -> None:
        name = f"{remote_folder}/{path.name}" if remote_folder else path.name
        self._carried_out("file", lambda: self.artifacts.update({name: path.read_bytes()}))

    def numbers(self) -> Numbers:
        found: Numbers = {}
        for name, value, _, step in self.points:
            found.setdefault((name, step), []).append(value)
        return found

    def _carried_out(self, verb: str, act: Callable[[], object]) -> None:
        self.before(verb)
        act()
        self.after(verb)
