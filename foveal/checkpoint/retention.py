"""The folder that holds a run's checkpoints: their names, which of them count, and which of them go.

A checkpoint is ``step-00000100-attempt-0003``; a name that begins with a dot is on its way in (``.draft-``) or out
(``.old-``, ``.gone-``). Only names of this form are ever touched.
"""

import logging
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from foveal.config import Config, machine

_NAME = re.compile(r"step-(\d{8,})-attempt-(\d{4,})")
_TEMPORARY_NAME = re.compile(r"\.(?:draft|old)-step-\d{8,}-attempt-\d{4,}")
_FORMAT_1 = re.compile(r"step-\d+")
_log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """When a checkpoint is written and which are kept."""

    every: int = machine(1000, "Steps between checkpoints; 0: only at the end and when asked to leave.", ge=0)
    keep: int = machine(2, "How many of the newest are kept.", ge=1)
    keep_every: int = machine(0, "Keep also those whose step is a multiple of this; 0: none.", ge=0)
    gigabytes: float = machine(
        200.0,
        "The most that a run's checkpoints may take together; the oldest go, never the newest. 0: no limit.",
        ge=0,
    )
    overlap: bool = machine(True, "Write while training goes on; false: training waits for the disk.")


class CheckpointDirectory:
    """One attempt's view of the folder. ``starts``: the step that each attempt began at, as far as it is known."""

    def __init__(self, root: Path, attempt: int, attempt_starts: Mapping[int, int]) -> None:
        self.root, self._attempt = root, attempt
        self._starts = dict(attempt_starts)
        self._removal = threading.Thread()

    def record_start(self, step: int) -> None:
        """Say where this attempt begins; said again, as after a roll-back, it changes nothing."""
        self._starts.setdefault(self._attempt, step)

    @property
    def furthest_start(self) -> int:
        """The furthest step that an attempt is known to have begun at."""
        return max(self._starts.values(), default=0)

    def step_of_nth_newest(self, count: int) -> int:
        """The step of the oldest of so many newest checkpoints; 0 where there are fewer."""
        newest = self.list_checkpoints()[-count:]
        return _parse_name(newest[0])[0] if len(newest) == count else 0

    def checkpoint_path(self, step: int) -> Path:
        """Where this attempt publishes a step."""
        return self.root / f"step-{step:08d}-attempt-{self._attempt:04d}"

    def list_checkpoints(self) -> list[Path]:
        """From the first step to the last, and by attempt; a copy under another name is none of ours."""
        return sorted((each for each in self.root.iterdir() if _NAME.fullmatch(each.name)), key=_parse_name)

    def list_format1_checkpoints(self) -> list[Path]:
        """Checkpoints of a foveal before attempts had numbers."""
        return sorted(each for each in self.root.iterdir() if _FORMAT_1.fullmatch(each.name))

    def is_invalidated(self, folder: Path) -> bool:
        """Whether a later attempt began at an earlier step: it has made, or will make, this step anew."""
        step, attempt = _parse_name(folder)
        return any(later > attempt and start < step for later, start in self._starts.items())

    def create_and_clean(self) -> None:
        """Make the folder, and undo what earlier attempts that were killed left half done; later ones are let alone.

        Raises: OSError.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        passing = [each for each in self.root.iterdir() if _TEMPORARY_NAME.fullmatch(each.name)]
        left = []
        for each in passing:
            folder = self.root / each.name[each.name.index("step-") :]
            if not self._is_own_or_earlier(folder):
                continue
            if each.name.startswith(".old-") and not folder.exists():  # killed between two renames of a replacement
                each.rename(folder)
            else:
                left.append(each)
        self.remove(left)

    def prune(self, newest: Path, corrupt: Collection[Path], cfg: CheckpointConfig) -> None:
        """Remove what is not to be kept: never ``newest``, and nothing of a later attempt.

        Torn and void ones do not count among those that are kept, and go when enough newer ones are there.
        """
        kept: list[Path] = []
        gone: list[Path] = []
        sound = 0
        ours = [each for each in self.list_checkpoints() if self._is_own_or_earlier(each)]
        useless = {each for each in ours if each != newest and (each in corrupt or self.is_invalidated(each))}
        for folder in reversed(ours):
            is_sound = folder not in useless
            step = _parse_name(folder)[0]
            stays = sound < cfg.keep or (is_sound and cfg.keep_every > 0 and step > 0 and step % cfg.keep_every == 0)
            sound += is_sound
            (kept if stays else gone).append(folder)
        total = 0
        for folder in (
            sorted(kept, key=useless.__contains__) if cfg.gigabytes else []
        ):  # the useless have what room is left
            total += sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            if total > cfg.gigabytes * 1e9 and folder != newest:
                _log.info("checkpoint.gigabytes=%g: %s goes", cfg.gigabytes, folder)
                gone.append(folder)
        self.remove(gone)

    def remove(self, folders: Sequence[Path]) -> None:
        """Take the names away at once, so that nothing half deleted is ever met, and the bytes in the background."""
        for folder in folders:
            try:
                folder.rename(self.root / f".gone-{secrets.token_hex(8)}")
            except OSError as error:  # the next attempt tidies up
                _log.warning("%s cannot be removed (%s)", folder, error)
        gone = list(self.root.glob(".gone-*"))
        if gone:
            self._removal = threading.Thread(
                target=_delete_folders, args=(gone,), name="checkpoint-removal", daemon=True
            )
            self._removal.start()

    def wait_for_removal(self, timeout_seconds: float) -> None:
        """Wait until the bytes are gone, at most so long."""
        if self._removal.is_alive():
            self._removal.join(timeout_seconds)

    def _is_own_or_earlier(self, folder: Path) -> bool:
        """Whether a folder is of this attempt or of an earlier one."""
        return _parse_name(folder)[1] <= self._attempt


def _parse_name(folder: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(folder.name)
    assert found is not None, "only names of ours are asked for"
    return int(found[1]), int(found[2])


def _delete_folders(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
