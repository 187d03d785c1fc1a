"""Class names that are numbers: whether a label such as 2 is the class named '2' or the class at position 2."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from foveal.data.format.manifest import Manifest, read_manifest
from foveal.data.format.shard_index import INDEX_SUFFIX, IndexRules, mmap_index
from foveal.errors import ConfigError, DataError

NAMES, POSITIONS = "names", "positions"
NUMBER = re.compile(r"([+-]?[0-9]{1,40})(?:\.0*)?")  # whole numbers, also as a float writes them


class LabelMismatchError(DataError):
    """A label that is no class name where labels are names, or no position where they are positions."""


def values_of_names(classes: Sequence[str]) -> dict[int, int]:
    """Return the number that a class name is, by the class's position, for names that are whole numbers."""
    matches = ((position, NUMBER.fullmatch(name)) for position, name in enumerate(classes))
    return {position: int(match[1]) for position, match in matches if match}


def is_open(classes: Sequence[str] | None) -> bool:
    """Whether names and positions are two meanings of a number: some name is the number of another position."""
    return any(position != value for position, value in values_of_names(classes or ()).items())


def resolve_rules(rules: IndexRules, numeric_labels: str | None, output_folder: Path) -> IndexRules:
    """Return the rules with ``numeric_labels`` where names are open, given or as the folder was indexed before.

    A folder that was indexed or packed with these names keeps its meaning, also where the names are not given again.
    Raises: ConfigError for a ``numeric_labels`` that is unknown or without class names.
    """
    if numeric_labels not in (None, NAMES, POSITIONS):
        raise ConfigError(f"--numeric-labels {numeric_labels}: labels are {NAMES} or {POSITIONS}")
    if numeric_labels is not None and rules.classes is None:
        raise ConfigError(f"--numeric-labels {numeric_labels} is for names that are numbers: give them with --classes")
    if numeric_labels is None:
        try:
            manifest = read_manifest(output_folder)
            if rules.classes in (None, manifest.classes) and is_open(manifest.classes):
                return _resolve_as_before(rules, manifest, output_folder)
        except (OSError, DataError):
            pass
    return replace(rules, numeric_labels=numeric_labels) if is_open(rules.classes) else rules


def _resolve_as_before(rules: IndexRules, manifest: Manifest, output_folder: Path) -> IndexRules:
    """Return the rules with the meaning of labels in the manifest's first index. Raises: as ``mmap_index``."""
    first = next(shard.file for split in manifest.splits.values() for shard in split.shards)
    before = mmap_index(output_folder / f"{first}{INDEX_SUFFIX}")[0].rules
    if before["classes"] is None:  # packed, or indexed without names: .cls holds positions
        return rules if rules.classes is None else replace(rules, numeric_labels=POSITIONS)
    named = replace(rules, classes=manifest.classes)
    known = before.get("numeric_labels")
    if before["classes"] == named.to_metadata()["classes"] and known in (NAMES, POSITIONS):
        return replace(named, numeric_labels=str(known))
    return rules


def decide(location: str, classes: Sequence[str], counts: Mapping[str, np.ndarray]) -> str:
    """Return whether the labels of all shards are names or positions.

    counts: int64 [K], samples per class of the shards that were read as names, and of those read as positions.
    Raises: DataError if both fit and differ, or if neither fits.
    """
    values = values_of_names(classes)
    position_of = {value: position for position, value in values.items()}
    by_name, by_position = (np.flatnonzero(counts[reading]).tolist() for reading in (NAMES, POSITIONS))
    no_names = [position for position in by_position if position not in position_of]
    no_positions = [classes[label] for label in by_name if not 0 <= values.get(label, -1) < len(classes)]
    if no_names and no_positions:
        raise DataError(
            f"{location}: labels are either names or positions from 0: '{no_positions[0]}' is a name and no position, and "
            f"{no_names[0]} a position and no name in --classes: write the labels in one way"
        )
    if no_names or no_positions:
        return POSITIONS if no_names else NAMES
    numbers = [values[label] for label in by_name if values[label] != label]
    numbers += [position for position in by_position if position_of[position] != position]
    if numbers:
        number = min(numbers)
        raise DataError(
            f"{location}: names in --classes are numbers, so that label {number} may be the class named '{number}' or the "
            f"class at position {number}, '{classes[number]}': say --numeric-labels {NAMES} or {POSITIONS}"
        )
    return NAMES
