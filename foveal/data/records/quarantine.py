"""Samples that do not decode: ``quarantine.jsonl`` in the run directory, one line per sample, and their limit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.atomic import AppendLog, encode_json_lines, parse_json_object, read_file_bytes, write_atomic
from foveal.data.batch import BadSample
from foveal.errors import CheckpointError, DataError

QuarantineEntry = dict[str, Any]  # step, split, shard, key, offset, reason


class Quarantine:
    """Bad samples of all ranks without duplicates; all ranks hold the same entries, rank 0 writes them.

    max_count_by_split: largest allowed number of bad samples per split. entries: those up to the step that the run
    resumes from (``rewind_entries``).
    """

    def __init__(self, file: Path, max_count_by_split: Mapping[str, float], entries: Sequence[QuarantineEntry]) -> None:
        self._file, self._max_bad_per_split = file, max_count_by_split
        self._log = AppendLog(file)
        self._entries = {_entry_identity(entry): entry for entry in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def add_entries(self, entries: Sequence[QuarantineEntry], *, is_writer: bool) -> None:
        """Add the entries that the ranks gathered, in the same order on every rank; one rank is the writer."""
        new = {}
        for entry in entries:
            if _entry_identity(entry) not in self._entries:
                new.setdefault(_entry_identity(entry), entry)
        self._entries |= new
        if is_writer and new:
            self._log.append_json_lines(new.values())

    def close(self) -> None:
        """Retry the lines that a full disk refused, and close the file."""
        self._log.close()

    def check_limits(self) -> None:
        """Raise DataError if a split has more bad samples than its limit."""
        for split, limit in self._max_bad_per_split.items():
            bad = [entry for entry in self._entries.values() if entry["split"] == split]
            if len(bad) > limit:
                raise DataError(
                    f"{len(bad)} samples of split '{split}' do not decode, and data.max_bad_fraction allows {limit:.4g}; "
                    f"the last is {bad[-1]['shard']}: sample '{bad[-1]['key']}' ({bad[-1]['reason']}); all are in "
                    f"{self._file}: repair the shards, or raise data.max_bad_fraction"
                )


def make_entry(bad_sample: BadSample, step: int) -> QuarantineEntry:
    """Return the quarantine entry of a bad sample."""
    return {
        "step": step,
        "split": bad_sample.split,
        "shard": bad_sample.shard,
        "key": bad_sample.webdataset_key,
        "offset": bad_sample.byte_offset,
        "reason": bad_sample.reason,
    }


def rewind_entries(file: Path, last_step: int) -> list[QuarantineEntry]:
    """Return the entries of the steps up to ``last_step``; remove all others and a partial last line from the file."""
    if not file.exists():
        return []
    lines = read_file_bytes(file).split(b"\n")[:-1]  # not splitlines: keys may have other line-ending characters
    entries = [parse_json_object(line, file) for line in lines]
    if not all(type(entry.get("step")) is int for entry in entries):
        raise CheckpointError(f"{file} is damaged (an entry has no step): restore it")
    valid = [entry for entry in entries if entry["step"] <= last_step]
    write_atomic(file, encode_json_lines(valid))
    return valid


def _entry_identity(entry: QuarantineEntry) -> tuple[str, str, str]:
    """Return split, shard and key of a sample; without the shard's folder, which may change between attempts."""
    return entry["split"], entry["shard"].rpartition("/")[2], entry["key"]
