"""pack.json of a packed data set: what it was made from, so that another source or other options are not taken for it.

The source is known by its kind, its name and a fingerprint of its content, never by its path: source and data set may
move, and equal sources give equal files.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from foveal.atomic import write_json
from foveal.config import Config
from foveal.data.format.manifest import read_manifest
from foveal.data.image.decode import UndecodableError, read_image_size
from foveal.data.pack.options import PackOptions
from foveal.data.pack.source import PackDataset, spread_numbers
from foveal.errors import DataError, FovealError

RECORD_NAME = "pack.json"

_FORMAT_VERSION = 1
_NUM_READ = 64  # samples per split whose bytes are part of the fingerprint


@dataclass(frozen=True)
class PackSource:
    """Source of a pack. settings: the source's own options that decide what is read, such as its columns.

    path None: the source is part of foveal, and always the same.
    """

    kind: str
    path: Path | None = None
    settings: dict[str, str | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.kind if self.path is None else os.fsencode(self.path.resolve().name).decode(errors="replace")


class PackRecord(Config):
    """Content of pack.json.

    summary: what the source was taken for, in lines. notes: what else a reader should know, in sentences.
    """

    format: int = Field(default=_FORMAT_VERSION, ge=_FORMAT_VERSION, le=_FORMAT_VERSION)
    kind: str
    source: str
    settings: dict[str, str | None]
    options: dict[str, Any]
    fingerprint: str | None
    summary: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make_record(
    source: PackSource,
    options: PackOptions,
    fingerprint: str | None,
    summary: tuple[str, ...],
    notes: tuple[str, ...],
) -> PackRecord:
    """Return the record of a data set that is being packed. fingerprint: of a source with a path."""
    return PackRecord(
        kind=source.kind,
        source=source.name,
        settings=source.settings,
        options=_result_options(options),
        fingerprint=fingerprint,
        summary=summary,
        notes=notes,
    )


def write_record(record: PackRecord, folder: Path) -> None:
    """Write pack.json."""
    write_json(folder / RECORD_NAME, record.to_dict())


def read_record(folder: Path) -> PackRecord | None:
    """Return the record of a packed data set, or None if an earlier version packed it. Raises: DataError."""
    file = folder / RECORD_NAME
    try:
        return PackRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        problem = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(
            f"{file} cannot be read ({problem}): remove it, and it is no longer known what the shards were made from"
        ) from None


def check_same_pack(
    folder: Path, source: PackSource, options: PackOptions, load_dataset: Callable[[], PackDataset]
) -> None:
    """Check that a packed folder was made from this source with these options.

    A source that is gone is known by its name only, and a folder without a record is taken as it is.
    Raises: DataError if the folder was made from another source or with other options.
    """
    record = read_record(folder)
    if record is None:
        return
    remedy = "choose another folder, or remove this one to pack it anew"
    if record.kind != source.kind:
        raise DataError(f"{folder} was packed from {record.kind} '{record.source}', not from {_name(source)}: {remedy}")
    options_before = _result_options(PackOptions.from_dict(record.options, str(folder / RECORD_NAME)))
    before, now = record.settings | options_before, source.settings | _result_options(options)
    if changed := [name for name in now if before.get(name) != now[name]]:
        differences = "; ".join(
            f"--{name.replace('_', '-')}: {_format(before.get(name))}, now {_format(now[name])}" for name in changed
        )
        raise DataError(f"{folder} was packed with other options ({differences}): {remedy}")
    if source.path is None or (not source.path.exists() and source.name == record.source):
        return
    dataset = load_dataset()
    if compute_fingerprint(dataset) != record.fingerprint:
        has_classes = read_manifest(folder).classes is not None
        if has_classes != (dataset.classes is not None):
            before, now = ("with", "without") if has_classes else ("without", "with")
            raise DataError(
                f"{folder} was packed {before} classes, and {source.path} is now read {now} (--labels): {remedy}"
            )
        reason = "has changed since, or is another of this name" if source.name == record.source else "differs from it"
        raise DataError(
            f"{folder} was packed from {record.kind} '{record.source}', and {source.path} {reason}: {remedy}"
        )


def compute_fingerprint(dataset: PackDataset) -> str:
    """Return a sha256 of a source's content: classes, listing, labels, and the bytes of 64 samples per split."""
    digest = hashlib.sha256(json.dumps([dataset.classes, dataset.listing]).encode())
    for name, split in dataset.splits.items():
        count = len(split.sample_numbers)
        digest.update(f"{name} {count}".encode())
        digest.update(np.asarray(split.sample_numbers, dtype="<i8").tobytes())
        digest.update(np.asarray(split.labels, dtype="<i8").tobytes())
        for number in spread_numbers(split, _NUM_READ):
            try:
                sample = split.get_sample(number)
                data = sample.read_bytes()
                digest.update(sample.key.encode() + hashlib.sha256(data).digest())
                if sample.read_label is not None:
                    digest.update(hashlib.sha256(sample.read_label(read_image_size(data))).digest())
            except (OSError, UndecodableError, FovealError):  # packing names what cannot be read
                digest.update(b"unreadable")
    return digest.hexdigest()


def _result_options(options: PackOptions) -> dict[str, Any]:
    """Return the options that can change a shard."""
    return {name: value for name, value in options.to_dict().items() if name != "workers"}


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else str(value)


def _name(source: PackSource) -> str:
    return source.kind if source.path is None else f"{source.kind} '{source.path}'"
