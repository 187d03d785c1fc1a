"""The folder of a run's checkpoints: their names, which are valid, and which are removed.

A checkpoint is ``step-00000100-attempt-0003``. A name with a leading dot is a checkpoint being written (``.draft-``) or
removed (``.old-``, ``.gone-``). All other names are left untouched.
"""

import logging
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from foveal.atomic import list_tree
from foveal.checkpoint.config import CheckpointConfig

_NAME = re.compile(r"step-(\d{8,})-attempt-(\d{4,})")
_TEMPORARY_NAME = re.compile(r"\.(?:draft|old)-step-\d{8,}-attempt-\d{4,}")
_FORMAT_1 = re.compile(r"step-\d+")
_log = logging.getLogger(__name__)


class CheckpointDirectory:
    """One attempt's view of the folder. ``start_steps_by_attempt``: the first step of each attempt, where it is known."""

    def __init__(self, root: Path, attempt_number: int, start_steps_by_attempt: Mapping[int, int]) -> None:
        self.root, self._attempt = root, attempt_number
        self._starts = dict(start_steps_by_attempt)
        self._removal = threading.Thread()
        self._num_bytes: dict[Path, int] = {}  # of checkpoints that were saved or measured

    def remember_first_start(self, step: int) -> None:
        """Record the first step of this attempt; a second call, as after a roll-back, has no effect."""
        self._starts.setdefault(self._attempt, step)

    @property
    def furthest_start_step(self) -> int:
        """The highest known first step of an attempt; 0 without any."""
        return max(self._starts.values(), default=0)

    def step_of_nth_newest(self, count: int) -> int:
        """Return the step of the ``count``-th newest checkpoint; 0 if there are fewer."""
        newest = self.list_checkpoints()[-count:]
        return _parse_name(newest[0])[0] if len(newest) == count else 0

    def own_checkpoint_path(self, step: int) -> Path:
        """Return the path of this attempt's checkpoint of a step."""
        return self.root / f"step-{step:08d}-attempt-{self._attempt:04d}"

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoints by ascending step, then attempt; folders with other names are ignored."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return sorted((folder for folder in folders if _NAME.fullmatch(folder.name)), key=_parse_name)

    def list_format1_checkpoints(self) -> list[Path]:
        """Return the checkpoints of format 1, which had no attempt number."""
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(folder for folder in folders if _FORMAT_1.fullmatch(folder.name))

    def is_invalidated_by_attempt(self, folder: Path) -> bool:
        """Return whether a later attempt began at an earlier step, and so repeats this checkpoint's step."""
        step, attempt = _parse_name(folder)
        return any(later > attempt and start < step for later, start in self._starts.items())

    def create_and_remove_leftovers(self) -> None:
        """Create the folder and clean up after killed attempts; later attempts' folders are left untouched.

        Raises: OSError.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        temporary_folders = [path for path in self.root.iterdir() if _TEMPORARY_NAME.fullmatch(path.name)]
        obsolete = []
        for temporary in temporary_folders:
            folder = self.root / temporary.name[temporary.name.index("step-") :]
            if not self._is_own_or_earlier(folder):
                continue
            if (
                temporary.name.startswith(".old-") and not folder.exists()
            ):  # killed between the renames of a replacement
                temporary.rename(folder)
            else:
                obsolete.append(temporary)
        self.remove_in_background(obsolete)

    def remember_size(self, folder: Path, num_bytes: int) -> None:
        """Record the size of a checkpoint of this attempt, whose files are then not looked at."""
        self._num_bytes[folder] = num_bytes

    def prune(self, newest: Path, corrupt: Collection[Path], cfg: CheckpointConfig) -> None:
        """Remove checkpoints that the settings do not keep; never ``newest``, and none of a later attempt.

        Corrupt and invalidated checkpoints do not count for ``keep`` and are removed once enough newer ones exist.
        """
        kept_folders: list[Path] = []
        removals: list[Path] = []
        num_valid = 0
        candidates = [folder for folder in self.list_checkpoints() if self._is_own_or_earlier(folder)]
        unusable = {
            folder
            for folder in candidates
            if folder != newest and (folder in corrupt or self.is_invalidated_by_attempt(folder))
        }
        for folder in reversed(candidates):
            is_valid = folder not in unusable
            step = _parse_name(folder)[0]
            is_multiple = cfg.keep_every > 0 and step > 0 and step % cfg.keep_every == 0
            keep = num_valid < cfg.keep or (is_valid and is_multiple)
            num_valid += is_valid
            (kept_folders if keep else removals).append(folder)
        if cfg.max_gigabytes:
            total = 0
            for folder in sorted(
                kept_folders, key=unusable.__contains__
            ):  # unusable checkpoints get the remaining space
                if folder not in self._num_bytes:  # of an earlier attempt: measured once
                    self._num_bytes[folder] = sum(file.stat().st_size for file in list_tree(folder)[1])
                total += self._num_bytes[folder]
                if total > cfg.max_gigabytes * 1e9 and folder != newest:
                    _log.info("checkpoint.max_gigabytes=%g: %s is removed", cfg.max_gigabytes, folder)
                    removals.append(folder)
        self.remove_in_background(removals)

    def remove_in_background(self, folders: Sequence[Path]) -> None:
        """Rename the folders, so that no partly deleted checkpoint is visible, and delete them in the background."""
        for folder in folders:
            try:
                folder.rename(self.root / f".gone-{secrets.token_hex(8)}")
            except OSError as error:  # the next attempt cleans up
                _log.warning("%s cannot be removed (%s)", folder, error)
        renamed = list(self.root.glob(".gone-*"))
        if renamed:
            self._removal = threading.Thread(
                target=_delete_folders, args=(renamed,), name="checkpoint-removal", daemon=True
            )
            self._removal.start()

    def wait_for_removal(self, timeout_seconds: float) -> None:
        """Wait for the background deletion, at most ``timeout_seconds``."""
        if self._removal.is_alive():
            self._removal.join(timeout_seconds)

    def _is_own_or_earlier(self, folder: Path) -> bool:
        """Return whether a checkpoint belongs to this attempt or an earlier one."""
        return _parse_name(folder)[1] <= self._attempt


def _parse_name(folder: Path) -> tuple[int, int]:
    """Return (step, attempt) of a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, "the caller passes checkpoints only"
    return int(match[1]), int(match[2])


def _delete_folders(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
