"""Output files and folders of a command: new ones, which exist once they are complete."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from foveal.atomic import fsync, list_tree
from foveal.errors import ConfigError, DataError


def check_new(target: Path) -> None:
    """Check that an output can be made. Raises: ConfigError if it exists, or the folder for it does not."""
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists and is not overwritten: give another path, or remove it")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target} cannot be written: there is no folder {target.absolute().parent}")


@contextmanager
def new_outputs(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield the draft of each target, a path that does not exist; rename those that were made when the block ends.

    On any error, and on Ctrl-C, the drafts are removed and no target exists. The last target is renamed last: it may
    name the others. Raises: ConfigError for a target that exists; DataError if one cannot be written.
    """
    for target in targets:
        check_new(target)
    drafts = [target.with_name(f".{target.name}.{os.getpid()}.draft") for target in targets]
    published: list[Path] = []
    try:
        yield drafts
        made = [(draft, target) for draft, target in zip(drafts, targets, strict=True) if draft.exists()]
        with writing(targets[-1]):
            for draft, _ in made:
                _fsync_tree(draft)
            for draft, target in made:
                check_new(target)
                draft.rename(target)
                published.append(target)
                fsync(target.absolute().parent)
        published.clear()
    finally:
        for path in [*drafts, *published]:
            _remove(path)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an OSError, such as that of a full disk, into a DataError that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{target} cannot be written ({reason}): make room or choose another place") from None


def _fsync_tree(path: Path) -> None:
    folders, files = list_tree(path) if path.is_dir() else ([], [path])
    for entry in [*files, *folders]:
        fsync(entry)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
