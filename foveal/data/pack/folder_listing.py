"""Listing of a folder of images: the files of every split, and their classes if folders are classes."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foveal.data.format.class_counts import list_some
from foveal.data.format.shard_index import IMAGE_EXTENSIONS
from foveal.data.pack.image_tree import ImageFile, ImageFolder, PassedOver
from foveal.errors import DataError

_MAX_NAMED = 5  # names in a note or an error


@dataclass(frozen=True)
class ListedFiles:
    """Images of a split: class names, and per image its file and the position of its class (-1: no label)."""

    classes: tuple[str, ...]
    files: list[ImageFile]
    labels: np.ndarray

    @classmethod
    def without_labels(cls, files: list[ImageFile]) -> "ListedFiles":
        """Return files that have no classes."""
        return cls((), files, np.full(len(files), -1, dtype=np.int64))

    @property
    def paths(self) -> list[Path]:
        """Return the files' paths."""
        return [file.path for file in self.files]


@dataclass
class FolderListing:
    """Listing of a source in progress: what is passed over, and what a reader should know, in sentences."""

    passed_over: PassedOver
    notes: list[str] = field(default_factory=list)

    def list_unlabelled(self, tree: ImageFolder, splits: dict[str, ImageFolder]) -> dict[str, ListedFiles]:
        """Return the images of every split at any depth. Without splits all are 'train'. Raises: DataError if none."""
        if splits:
            self._pass_over(tree.images, "images beside the splits")
        images: dict[str, ListedFiles] = {}
        for split, folder in (splits or {"train": tree}).items():
            files = _list_files([folder], self.passed_over, "further links to an image of the same split")
            if not files:
                raise _no_images_error(folder, self.passed_over)
            for inner in folder.folders:
                if not inner.has_images:
                    self.passed_over.add("folders without images", inner.name)
            images[split] = ListedFiles.without_labels(files)
        return images

    def list_labelled(self, tree: ImageFolder, splits: dict[str, ImageFolder]) -> dict[str, ListedFiles]:
        """Return the images of every split; those of the first define the classes. Without splits all are 'train'.

        Raises: DataError if there are no class folders, or a split has other classes.
        """
        if not splits:
            return {"train": self._list_class_folders(tree)}
        self._pass_over(tree.images, "images beside the splits")
        (first, first_folder), *further = splits.items()
        images = {first: self._list_class_folders(first_folder)}
        for split, folder in further:
            images[split] = self._list_further_split(split, folder, images[first].classes, first_folder.path)
        return images

    def _list_further_split(
        self, split: str, folder: ImageFolder, classes: Sequence[str], class_source: Path
    ) -> ListedFiles:
        """Return the images of a split under given classes; without class folders they have no labels.

        Raises: DataError if the split has other classes, or is for validation and has no labels.
        """
        if folder.images and not folder.filled_folders:
            if split == "val":
                raise DataError(
                    f"{folder.path} holds {len(folder.images):,} images and no class folders, and validation needs "
                    f"labels: sort them into one folder per class, leave them out with --splits train=FOLDER, or "
                    f"pack all images without labels with --labels none"
                )
            for sub_folder in folder.folders:
                self.passed_over.add("folders without images", sub_folder.name)
            return ListedFiles.without_labels(list(folder.images))
        listed = self._list_class_folders(folder)
        if not set(listed.classes) <= set(classes):
            extra = sorted(set(listed.classes) - set(classes))
            names = ", ".join(extra[:_MAX_NAMED]) + (", ..." if extra[_MAX_NAMED:] else "")
            unlabelled = "" if split == "val" else f"; images without labels belong directly into {folder.path}"
            if len(listed.classes) == 1:
                inner = folder.filled_folders[0]
                unlabelled = (
                    f"; if '{inner.name}' is no class, state its path, --splits ...,{split}=FOLDER/{inner.name}"
                )
            raise DataError(
                f"{folder.path} has classes that {class_source} lacks: {names}: class folders have the same names in "
                f"every split, also in upper and lower case{unlabelled}"
            )
        position = {name: label for label, name in enumerate(classes)}
        labels = np.array([position[name] for name in listed.classes])[listed.labels]
        return ListedFiles(listed.classes, listed.files, labels)

    def _list_class_folders(self, folder: ImageFolder) -> ListedFiles:
        """Return the images of class folders, by name. Raises: DataError for a class without images."""
        if folder.images and not folder.filled_folders:
            raise DataError(
                f"{folder.path} holds {len(folder.images):,} images and no class folders, which --labels folders reads: "
                f"sort them into one folder per class, or pack them without labels with --labels none"
            )
        self._pass_over(folder.images, "images beside class folders")
        by_name: dict[str, list[ImageFolder]] = {}
        for class_folder in folder.folders:
            by_name.setdefault(_class_name(class_folder), []).append(class_folder)
        classes = tuple(sorted(by_name))
        files: list[ImageFile] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            class_files = _list_files(by_name[name], self.passed_over, "further links to an image of the same class")
            if not class_files:
                raise _no_images_error(by_name[name][0], self.passed_over, folder)
            if len(by_name[name]) > 1:
                self.notes.append(f"class '{name}' has several folders in '{folder.name}', in other Unicode forms")
            files += class_files
            labels += [label] * len(class_files)
        if not files:
            raise _no_images_error(folder, self.passed_over, folder)
        _note_sub_folders(folder, self.notes)
        return ListedFiles(classes, files, np.array(labels, dtype=np.int64))

    def _pass_over(self, files: Iterable[ImageFile], reason: str) -> None:
        for file in files:
            self.passed_over.add(reason, file.path.name)


def _class_name(folder: ImageFolder) -> str:
    """Return the name in one Unicode form (NFC): macOS and its archives write another. Raises: DataError."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(folder.path)!r}: the folder's name is not UTF-8: rename it") from None
    return unicodedata.normalize("NFC", folder.name)


def _list_files(folders: Sequence[ImageFolder], passed_over: PassedOver, reason: str) -> list[ImageFile]:
    """Return the files below folders by path; of a file that links lead to again, one, if possible without a link.

    reason: why the others are passed over.
    """
    files = sorted((file for folder in folders for file in folder.walk()), key=lambda file: file.path)
    if not any(file.linked for file in files):
        return files
    kept: dict[tuple[str, str], ImageFile] = {file.real_path: file for file in files if not file.linked}
    for file in files:
        if kept.setdefault(file.real_path, file) is not file:
            passed_over.add(reason, file.path.name)
    return [file for file in files if kept[file.real_path] is file]


def _no_images_error(
    folder: ImageFolder, passed_over: PassedOver, class_parent: ImageFolder | None = None
) -> DataError:
    """Return the error of a folder without images. class_parent: the folder whose sub-folders are classes, if any."""
    expected = (
        f": one folder per class is expected in {class_parent.path}; give it images or remove it"
        if class_parent
        else ""
    )
    found = f"; passed over: {passed_over.describe()}" if passed_over.counts else ""
    return DataError(f"{folder.path} holds no images ({', '.join(IMAGE_EXTENSIONS)}){expected}{found}")


def _note_sub_folders(folder: ImageFolder, notes: list[str]) -> None:
    """Note class folders with sub-folders: these may be the classes, if the source is one folder too high."""
    nested = [class_folder for class_folder in folder.folders if class_folder.filled_folders]
    if nested:
        inner = sorted({sub_folder.name for class_folder in nested for sub_folder in class_folder.filled_folders})
        notes.append(
            f"{len(nested):,} of {len(folder.folders):,} class folders of '{folder.name}' have sub-folders "
            f"({list_some(inner)}), whose images belong to the class"
        )


def note_numbers(classes: Sequence[str], notes: list[str]) -> None:
    """Note classes that are named by numbers which are not their labels: labels follow the names as text."""
    if not all(name.isdecimal() for name in classes):
        return
    if others := [label for label, name in enumerate(classes) if label != int(name)]:
        notes.append(
            f"class folders are named by numbers, and labels are positions in the order of the names as text, as in "
            f"torchvision: label {others[0]} is '{classes[others[0]]}'"
        )
