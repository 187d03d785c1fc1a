"""Tables in parts: which files of a set, such as train-00000-of-00002.parquet, are there."""

import re
from collections.abc import Iterable
from pathlib import Path

from foveal.data.format.class_counts import list_some
from foveal.errors import DataError

# train-00002-of-00004.parquet, with the hash that Hugging Face appends. An image 1_of_3.jpg is no part of a table.
_PART = re.compile(
    r"(.*?)[-_.]?(\d+)[-_.]?of[-_.]?(\d+)(?:[-_.][0-9a-f]{8,})?(\.(?:parquet|arrow|csv|tsv|jsonl?|tar|zip)(?:\.\w+)?)",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")


def describe_missing_parts(source: Path, files: Iterable[Path]) -> list[str]:
    """Return a note on every set of parts that is incomplete by the totals in its names.

    files: absolute paths below ``source``, others are passed over.
    Raises: DataError if one set states several totals, or one number twice, as two writings of one table in a folder do.
    """
    sets: dict[tuple[Path, str, str], dict[int, tuple[int, Path]]] = {}
    for file in sorted(files):
        match = _PART.fullmatch(file.name)
        if not match or not file.is_relative_to(source):
            continue
        parts = sets.setdefault((file.parent, match[1], match[4]), {})
        number, total = int(match[2]), int(match[3])
        other_total, other = parts.get(number) or next(iter(parts.values()), (total, file))
        if other_total != total or number in parts:
            raise DataError(
                f"{source}: {other.relative_to(source)} and {file.relative_to(source)} are parts of two writings of one "
                f"table, whose rows would be packed twice: leave one set of parts in the folder"
            )
        parts[number] = (total, file)
    notes = []
    for parts in sets.values():
        total, file = next(iter(parts.values()))
        start = 1 if total in parts and 0 not in parts else 0  # some writers count from 1
        if missing := [number for number in range(start, start + total) if number not in parts]:
            verb = "is" if len(missing) == 1 else "are"
            notes.append(
                f"{len(missing):,} of {total:,} parts {verb} missing, by the name of {file.relative_to(source)}: number "
                f"{list_some(list(map(str, missing)))}"
            )
    return notes


def describe_other_parts(table: Path) -> list[str]:
    """Return a note if a table is one of several parts: by the total in its name, or by the tables beside it."""
    match = _PART.fullmatch(table.name)
    if match:
        total = int(match[3])
        sentence = (
            f"the table is part {int(match[2])} of {total:,}, by its name, and no other part is packed: `foveal data"
        )
        return [f"{sentence} pack hf` packs a folder of parts"] if total > 1 else []
    pattern = _NUMBER.sub("#", table.name)
    beside = (file.name for file in table.parent.iterdir() if file.suffix == table.suffix and file.is_file())
    others = sorted(name for name in beside if name != table.name and _NUMBER.sub("#", name) == pattern)
    return [f"tables beside it differ in a number only and are not packed: {list_some(others)}"] if others else []
