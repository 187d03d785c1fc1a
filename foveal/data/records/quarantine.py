"""The list of samples that do not decode: ``quarantine.jsonl`` in the run directory, one line a sample, and its limit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog, encode_json_lines, parse_json_object, read_file_bytes, write_atomic
from foveal.data.batch import BadSample
from foveal.errors import CheckpointError, DataError

QuarantineEntry = dict[str, Any]  # step, split, shard, key, offset, reason


class Quarantine:
    """Every bad sample that any rank met, each once; all ranks hold the same list, rank 0 writes it down.

    limits: how many a split may have. On opening, entries of steps after the one that the run resumes from are void.
    """

    def __init__(self, file: Path, max_bad_per_split: Mapping[str, float], entries: Sequence[QuarantineEntry]) -> None:
        self._file, self._limits = file, max_bad_per_split
        self._lines = AppendLog(file)
        self._known = {_entry_identity(entry): entry for entry in entries}

    def __len__(self) -> int:
        return len(self._known)

    def add_entries(self, entries: Sequence[QuarantineEntry], *, is_writer: bool) -> None:
        """Take in what the ranks met since the last call, in the same order on every rank; one of them writes."""
        new = {}
        for entry in entries:
            if _entry_identity(entry) not in self._known:
                new.setdefault(_entry_identity(entry), entry)
        self._known |= new
        if is_writer and new:
            self._lines.append_json_lines(new.values())

    def close(self) -> None:
        """Write what a full disk had no room for, if there is some now."""
        self._lines.close()

    def check_limits(self) -> None:
        """Raise DataError when a split has more bad samples than it may have."""
        for split, limit in self._limits.items():
            bad = [entry for entry in self._known.values() if entry["split"] == split]
            if len(bad) > limit:
                raise DataError(
                    f"{len(bad)} samples of split '{split}' do not decode, and data.max_bad allows {limit:.4g}; the last "
                    f"is {bad[-1]['shard']}: sample '{bad[-1]['key']}' ({bad[-1]['reason']}); all are in {self._file}: "
                    f"mend the shards, or raise data.max_bad"
                )


def make_entry(bad_sample: BadSample, step: int) -> QuarantineEntry:
    """A line of the list."""
    return {
        "step": step,
        "split": bad_sample.split,
        "shard": bad_sample.shard,
        "key": bad_sample.webdataset_key,
        "offset": bad_sample.byte_offset,
    } | {"reason": bad_sample.reason}


def rewind_entries(file: Path, last_step: int) -> list[QuarantineEntry]:
    """The entries of the steps up to ``step``; the file keeps only these. A line that a kill cut short is left out."""
    if not file.exists():
        return []
    whole = read_file_bytes(file).split(b"\n")[:-1]  # not splitlines: a key may have other characters that end lines
    entries = [parse_json_object(line, file) for line in whole]
    if not all(type(entry.get("step")) is int for entry in entries):
        raise CheckpointError(f"{file} is damaged (an entry is of no step): restore it")
    kept = [entry for entry in entries if entry["step"] <= last_step]
    write_atomic(file, encode_json_lines(kept))
    return kept


def _entry_identity(entry: QuarantineEntry) -> tuple[str, str, str]:
    """What a sample is known by: its shard without the folder, which may be another one after every restart."""
    return entry["split"], entry["shard"].rpartition("/")[2], entry["key"]
