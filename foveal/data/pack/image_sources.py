"""Paths of images: folders, files, globs and lists of files, as one tree below the folder that holds them all."""

import codecs
import fnmatch
import glob
import itertools
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from foveal.data.pack.image_tree import (
    ImageFile,
    ImageFolder,
    PassedOver,
    build_tree,
    reason_of_name,
    reason_of_suffix,
    scan_folder,
)
from foveal.data.pack.writer import map_in_order
from foveal.errors import ConfigError, DataError

_WILDCARDS = frozenset("*?[")
_CHUNK = 256  # files per job that looks whether they exist
_STDIN = "-"


@dataclass(frozen=True)
class ImageSources:
    """Where the images of a data set lie.

    root: the folder that holds everything below. paths: folders and files. globs: patterns of paths. listed: the files
    of a list, and ``list_name`` for messages. is_folder: whether the root is the only source.
    """

    root: Path
    paths: tuple[Path, ...] = ()
    globs: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    list_name: str = ""

    @property
    def is_folder(self) -> bool:
        return self.paths == (self.root,) and not self.globs and not self.listed

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the paths that are folders."""
        return tuple(path for path in self.paths if path.is_dir())

    def describe(self) -> str:
        """Return how a selection of paths was given, without the path of the root, which may move; empty for a folder."""
        if self.is_folder:
            return ""
        num_folders = len(self.folders)
        counts = {
            "folders": num_folders,
            "single files": len(self.paths) - num_folders,
            "listed files": len(self.listed),
        }
        parts = [f"'{Path(pattern).relative_to(self.root).as_posix()}'" for pattern in self.globs]
        return (
            f", given as {' and '.join([*parts, *(f'{name} ({count:,})' for name, count in counts.items() if count)])}"
        )


def find_sources(paths: Sequence[Path], files_from: str | None = None) -> ImageSources:
    """Return the sources that paths and a list of files name; nothing but the list is read.

    A path with a wildcard is a glob unless it exists. files_from: a text file of paths, one in a line or separated by
    zero bytes, relative to the working directory; '-' is standard input.
    Raises: ConfigError without sources, DataError if the list cannot be read or is empty.
    """
    if not paths and files_from is None:
        raise ConfigError("no images are named: give a folder, files, a quoted glob, or --files-from LIST")
    if files_from is None and len(paths) == 1 and not _is_glob(paths[0]) and not paths[0].is_file():
        return ImageSources(paths[0], (paths[0],))  # a missing folder is named when it is read
    globs = tuple(os.path.abspath(Path(path).expanduser()) for path in paths if _is_glob(path))  # noqa: PTH100
    singles = tuple(dict.fromkeys(Path(os.path.abspath(path)) for path in paths if not _is_glob(path)))  # noqa: PTH100
    listed = () if files_from is None else _read_list(files_from)
    places = [_fixed_folder(pattern) for pattern in globs]
    places += [str(path) if path.is_dir() else str(path.parent) for path in singles]
    places += [os.path.dirname(file) for file in listed]  # noqa: PTH120 - a list may have a million files
    list_name = {None: "", _STDIN: "standard input"}.get(files_from, str(files_from))
    return ImageSources(Path(os.path.commonpath(dict.fromkeys(places))), singles, globs, listed, list_name)


def scan_sources(sources: ImageSources, passed_over: PassedOver, leave_out: Path, workers: int) -> ImageFolder:
    """Return the images of all sources, each path once, in a tree from their root; count in ``passed_over`` the rest.

    leave_out: a folder that is skipped. workers: threads that look whether files exist.
    Raises: DataError for a path that does not exist, a glob without files, or a folder that cannot be read.
    """
    if sources.is_folder:
        if not sources.root.is_dir():
            raise DataError(f"{sources.root}: no such folder of images, and no such file")
        return scan_folder(sources.root, passed_over, leave_out)
    images: dict[Path, ImageFile] = {}
    for image in _find_images(sources, passed_over, leave_out, workers):
        if image.path in images:
            passed_over.add("images that are named again", image.path.name)
        images.setdefault(image.path, image)
    return build_tree(sources.root, images.values())


def _is_glob(path: Path) -> bool:
    return not _WILDCARDS.isdisjoint(str(path)) and not os.path.lexists(path)


def _fixed_folder(pattern: str) -> str:
    """Return the folder of a glob that has no wildcard."""
    parts = Path(pattern).parts[:-1]
    return str(Path(*itertools.takewhile(_WILDCARDS.isdisjoint, parts)))


def _read_list(name: str) -> tuple[str, ...]:
    """Return the absolute paths of a list. Raises: DataError."""
    try:
        data = sys.stdin.buffer.read() if name == _STDIN else Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"--files-from {name} cannot be read ({error.strerror})") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"--files-from {name} is UTF-16: save it as UTF-8, with one path in a line")
    separator = b"\0" if b"\0" in data else b"\n"
    lines = (line.strip(b"\r\n") for line in data.removeprefix(codecs.BOM_UTF8).split(separator))
    files = tuple(os.path.abspath(os.fsdecode(line)) for line in lines if line.strip())  # noqa: PTH100
    if not files:
        raise DataError(f"--files-from {name} names no files: it has one path in a line")
    return files


def _find_images(sources: ImageSources, passed_over: PassedOver, leave_out: Path, workers: int) -> Iterator[ImageFile]:
    files: list[str] = []
    for path in sources.paths:
        if path.is_dir():
            yield from scan_folder(path, passed_over, leave_out).walk()
        else:
            files.append(str(path))
    yield from _check_files(files, "", sources.root, passed_over, workers)
    for pattern in sources.globs:
        yield from _expand_glob(pattern, sources.root, passed_over, leave_out, workers)
    yield from _check_files(sources.listed, sources.list_name, sources.root, passed_over, workers)


def _expand_glob(
    pattern: str, root: Path, passed_over: PassedOver, leave_out: Path, workers: int
) -> Iterator[ImageFile]:
    """Yield the images that a pattern matches; of a folder that it matches, all. '**' is any number of folders.

    Names with a dot at the start are matched by no wildcard. Raises: DataError if nothing matches.
    """
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: part != "**", parts))
    rest = parts[len(fixed) :]
    start = str(Path(*fixed))
    found = sorted(glob.glob(start)) if _has_wildcard(fixed) else [start]  # noqa: PTH207 - Path.glob shows hidden files
    folders = [Path(path) for path in found if Path(path).is_dir()]
    images: list[ImageFile] = []
    for folder in folders:
        others = PassedOver() if rest else passed_over  # of what the pattern does not match, images only are counted
        for image in scan_folder(folder, others, leave_out).walk():
            if not rest or _matches(image.path.relative_to(folder).parts, rest):
                images.append(image)
            else:
                passed_over.add("images that the pattern does not match", image.path.name)
    files = [] if rest else [path for path in found if Path(path) not in folders]
    images += _check_files(files, "", root, passed_over, workers)
    if not images and not files:
        raise DataError(
            f"{pattern}: no image has a name of this pattern; upper and lower case count, and a '[' in a name is "
            f"written '[[]'"
        )
    yield from images


def _has_wildcard(parts: Iterable[str]) -> bool:
    return any(not _WILDCARDS.isdisjoint(part) for part in parts)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the parts of a path, or of a folder above it, match those of a pattern."""
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_matches(parts[start:], patterns[1:]) for start in range(len(parts)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _check_files(
    files: Sequence[str], list_name: str, root: Path, passed_over: PassedOver, workers: int
) -> Iterator[ImageFile]:
    """Yield the images among files; count the others. list_name: of the list that names them, for messages.

    Raises: DataError for a file that does not exist.
    """

    @lru_cache(maxsize=4096)
    def find_real_folder(folder: str) -> str:
        return os.path.realpath(folder)

    def check(chunk: Sequence[str]) -> list[ImageFile | tuple[str, str]]:
        return [_check_file(file, list_name, root, find_real_folder) for file in chunk]

    chunks = (files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK))
    for found in itertools.chain.from_iterable(map_in_order(check, chunks, workers)):
        if isinstance(found, ImageFile):
            yield found
        else:
            passed_over.add(*found)


def _check_file(
    file: str, list_name: str, root: Path, find_real_folder: Callable[[str], str]
) -> ImageFile | tuple[str, str]:
    """Return a file as image, or a reason to pass it over, with an example."""
    path = Path(file)
    if reason := next(filter(None, map(reason_of_name, path.relative_to(root).parts)), None):
        return reason, path.name
    try:
        is_link, mode = path.is_symlink(), path.stat().st_mode
    except OSError as error:
        hint = f"{list_name}: " if list_name else ""
        raise DataError(f"{hint}{file} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        return "folders in place of files" if stat.S_ISDIR(mode) else "neither files nor folders", path.name
    if reason_and_example := reason_of_suffix(path.name):
        return reason_and_example
    folder = str(path.parent)
    real_folder, real_name = os.path.split(os.path.realpath(file)) if is_link else (find_real_folder(folder), path.name)
    return ImageFile(path, real_folder, real_name, is_link or real_folder != folder)
