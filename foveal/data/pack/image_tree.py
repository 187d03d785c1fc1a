"""Scan of a folder of images: links are followed, hidden and system files are passed over, and all of that is counted.

Files are the same if their paths without links are. Inode numbers would say so too, but some network file systems have
none; and a scan of a million images costs no call per image.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.split_names import fold_case
from foveal.errors import DataError

# Further suffixes of the formats that are read; their samples get the field of the header.
IMAGE_SUFFIXES = (*IMAGE_EXTENSIONS, "jpe", "jfif", "jif", "pbm", "pnm")
# Images that are not read: they are named apart, because somebody expects them in the data set.
_OTHER_IMAGE_SUFFIXES = {
    *("avif", "heic", "heif", "hif", "j2c", "j2k", "jls", "jp2", "jpf", "jpx", "jxl", "jxr", "mpo", "qoi"),
    *("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "raw", "rw2"),
    *("dcm", "nii", "npy", "npz", "dds", "dib", "eps", "exr", "hdr", "ico", "pfm", "psd", "svg", "tga", "xcf"),
}
_SYSTEM_NAMES = {
    fold_case(name)
    for name in (
        *("__MACOSX", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "RECYCLER"),
        *("System Volume Information", "@eaDir", "@tmp", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"),
        *("lost+found", "__pycache__"),
    )
}
_MAX_EXAMPLES = 3


class ImageFile(NamedTuple):
    """An image file. real_folder, real_name: its path without links, linked: whether that is another path."""

    path: Path
    real_folder: str
    real_name: str
    linked: bool

    @property
    def real_path(self) -> tuple[str, str]:
        """Return folder and name that are equal for all paths of a file."""
        return self.real_folder, self.real_name


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder: the images directly in it and its sub-folders, both by name."""

    path: Path
    images: tuple[ImageFile, ...]
    folders: tuple["ImageFolder", ...]

    @property
    def name(self) -> str:
        """Return the folder's own name."""
        return self.path.name

    @cached_property
    def has_images(self) -> bool:
        """Whether there is an image in it or below it."""
        return bool(self.images) or any(folder.has_images for folder in self.folders)

    @cached_property
    def filled_folders(self) -> tuple["ImageFolder", ...]:
        """Return the sub-folders with images."""
        return tuple(folder for folder in self.folders if folder.has_images)

    def walk(self) -> Iterator[ImageFile]:
        """Yield the images in the folder and below it."""
        yield from self.images
        for folder in self.folders:
            yield from folder.walk()


@dataclass
class PassedOver:
    """Number of files that are not packed, by reason, with the first names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count files under a reason, such as 'hidden'; ``name`` is an example of them."""
        if count:
            self.counts[reason] += count
            self.examples.setdefault(reason, {})[name.encode(errors="backslashreplace").decode()] = None

    def describe(self) -> str:
        """Return counts and examples in one line; empty if nothing was passed over."""
        return "; ".join(f"{reason}: {count:,} ({self._list(reason)})" for reason, count in self.counts.items())

    def _list(self, reason: str) -> str:
        names = list(self.examples[reason])
        return ", ".join(names[:_MAX_EXAMPLES]) + (", ..." if len(names) > _MAX_EXAMPLES else "")


def scan_folder(root: Path, passed_over: PassedOver, leave_out: Path | None = None) -> ImageFolder:
    """Return the images of a folder and of all folders below it; count in ``passed_over`` what is no image.

    A link to a folder above itself is not followed. leave_out: a folder that is skipped, for example the output.
    Raises: DataError if a folder cannot be read.
    """
    scan = _Scan(passed_over, None if leave_out is None else leave_out.resolve())
    return scan.scan(root, os.path.realpath(root), False, ())


@dataclass
class _Scan:
    """Scan in progress."""

    passed_over: PassedOver
    leave_out: Path | None

    def scan(self, folder: Path, real_folder: str, linked: bool, above: tuple[str, ...]) -> ImageFolder:
        """Return a folder. real_folder: its path without links; linked: whether that is another; above: those above."""
        try:
            with os.scandir(folder) as stream:
                entries = sorted(stream, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror})") from None
        images: list[ImageFile] = []
        folders: list[ImageFolder] = []
        for entry in entries:
            is_folder = _leads_to(entry.is_dir)
            reason = reason_of_name(entry.name)
            if reason is not None:
                num_files = sum(len(names) for _, _, names in os.walk(entry.path)) if is_folder else 1
                self.passed_over.add(reason, entry.name, num_files)
                continue
            if not is_folder and not self._is_image(entry):
                continue
            real_path = (
                os.path.realpath(entry.path) if entry.is_symlink() else f"{real_folder.rstrip('/')}/{entry.name}"
            )
            is_linked = linked or entry.is_symlink()
            if not is_folder:
                path = folder / entry.name
                real_names = os.path.split(real_path) if entry.is_symlink() else (real_folder, path.name)
                images.append(ImageFile(path, *real_names, is_linked))
            elif is_linked and real_path in (*above, real_folder):
                self.passed_over.add("links to a folder above", entry.name)
            elif real_path != str(self.leave_out):
                folders.append(self.scan(folder / entry.name, real_path, is_linked, (*above, real_folder)))
        return ImageFolder(folder, tuple(images), tuple(folders))

    def _is_image(self, entry: "os.DirEntry[str]") -> bool:
        """Return whether an entry is an image file, or a link of that name which leads nowhere; count it if not."""
        reason_and_example = reason_of_suffix(entry.name)
        is_file = _leads_to(entry.is_file)
        if reason_and_example is None and (is_file or entry.is_symlink()):
            return True
        if is_file and reason_and_example is not None:
            self.passed_over.add(*reason_and_example)
        else:
            self.passed_over.add("broken links" if entry.is_symlink() else "neither files nor folders", entry.name)
        return False


def build_tree(root: Path, images: Iterable[ImageFile]) -> ImageFolder:
    """Return a folder with images below it, which are at different paths."""
    by_folder: dict[Path, list[ImageFile]] = {}
    for image in images:
        by_folder.setdefault(image.path.parent, []).append(image)
    inner: dict[Path, set[Path]] = {}
    for folder in by_folder:
        below = folder
        while below != root and below not in inner.setdefault(below.parent, set()):
            inner[below.parent].add(below)
            below = below.parent

    def build(folder: Path) -> ImageFolder:
        own = sorted(by_folder.get(folder, ()), key=lambda image: image.path.name)
        return ImageFolder(folder, tuple(own), tuple(build(path) for path in sorted(inner.get(folder, ()))))

    return build(root)


def reason_of_suffix(name: str) -> tuple[str, str] | None:
    """Return why a file is passed over for its suffix, with an example; None for an image."""
    _, dot, suffix = name.lower().rpartition(".")
    if dot and suffix in IMAGE_SUFFIXES:
        return None
    if dot and suffix in _OTHER_IMAGE_SUFFIXES:
        return "images of formats that are not read", f".{suffix}"
    return "files that are no images", f".{suffix}" if dot else name


def reason_of_name(name: str) -> str | None:
    """Return why a file or folder is passed over for its name alone, or None."""
    if fold_case(name) in _SYSTEM_NAMES:
        return "system files"
    return "hidden files" if name.startswith(".") else None


def _leads_to(check: Callable[[], bool]) -> bool:
    """Return the answer of a directory entry; False for a link that cannot be followed, such as one to itself."""
    try:
        return check()
    except OSError:
        return False
