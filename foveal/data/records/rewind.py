"""Files of JSON lines with a step each, rewound to the step from which a run continues."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveal.atomic import encode_json_lines, parse_json_object, read_file_bytes, write_atomic
from foveal.errors import CheckpointError


def rewind_entries(
    file: Path, last_step: int, is_kept_later: Callable[[dict[str, Any]], bool] = lambda _: False
) -> list[dict[str, Any]]:
    """Return the entries of the steps up to ``last_step``; remove all others and a partial last line from the file.

    ``is_kept_later``: whether an entry of a later step stays too. Raises: CheckpointError if the file is damaged.
    """
    if not file.exists():
        return []
    content = read_file_bytes(file)
    lines = content.split(b"\n")[:-1]  # not splitlines: keys may have other line-ending characters
    entries = [parse_json_object(line, file) for line in lines]
    if not all(type(entry.get("step")) is int for entry in entries):
        raise CheckpointError(f"{file} is damaged (an entry has no step): restore it")
    valid = [entry for entry in entries if entry["step"] <= last_step or is_kept_later(entry)]
    if (valid_content := encode_json_lines(valid)) != content:
        write_atomic(file, valid_content)
    return valid
