"""Where the labels of a folder of images come from: class folders, or nowhere. What is doubtful is asked."""

from collections.abc import Iterable
from typing import NoReturn

from foveal.data.format.class_counts import list_some
from foveal.data.pack.image_tree import ImageFolder
from foveal.errors import ConfigError, DataError

NO_LABELS, FOLDER_LABELS = "none", "folders"


def check_labels_option(stated: str | None) -> None:
    """Raise ConfigError for an unknown value of the option ``labels``."""
    if stated == "table":
        raise ConfigError(
            "--labels table: `foveal data pack table TABLE --label-column COLUMN` reads paths and labels from a table"
        )
    if stated not in (None, NO_LABELS, FOLDER_LABELS):
        raise ConfigError(
            f"--labels {stated}: state {NO_LABELS} or {FOLDER_LABELS}; `foveal data pack table` reads labels"
        )


def choose_label_source(
    tree: ImageFolder, splits: dict[str, ImageFolder], stated: str | None, *, is_one_folder: bool
) -> str:
    """Return 'folders' if the sub-folders of the tree, or of every split, are classes, and 'none' without classes.

    stated: the option ``labels``. Without it, images in one folder have no classes, and one level of folders that has
    all images has the classes. is_one_folder: whether the tree is one folder, and no selection of paths.
    Raises: DataError if folders leave it open.
    """
    parents = list(splits.values()) or [tree]
    if stated is not None:
        return stated
    if not any(parent.filled_folders for parent in parents):
        return NO_LABELS
    if not is_one_folder:
        _ask(tree, parents, f"the images lie in several folders, such as {_name_paths(tree, _image_folders(tree))}")
    if not parents[0].filled_folders:
        other = next(parent for parent in parents if parent.filled_folders)
        _ask(tree, parents, f"'{other.name}' has sub-folders of images, and '{parents[0].name}' has none")
    for parent in parents:
        _refuse_other_levels(tree, parents, parent)
    return FOLDER_LABELS


def _refuse_other_levels(tree: ImageFolder, parents: list[ImageFolder], parent: ImageFolder) -> None:
    """Refuse images that do not lie one level below a folder that has sub-folders of images. Raises: DataError."""
    if parent.images and parent.filled_folders:
        beside = f"{len(parent.images):,} {'images lie' if len(parent.images) > 1 else 'image lies'}"
        left_out = ", which leaves out the images beside them"
        _ask(tree, parents, f"{beside} directly in '{parent.name}', beside folders of images", left_out)
    nested = [folder for class_folder in parent.filled_folders for folder in class_folder.filled_folders]
    if nested:
        only = parent.filled_folders[0]
        remedy = (
            "" if parent.filled_folders[1:] or only.images else f"; pack {only.path} if the folders in it are classes"
        )
        _ask(tree, parents, f"images lie several levels deep, such as in {_name_paths(tree, nested)}", remedy)


def _ask(tree: ImageFolder, parents: list[ImageFolder], problem: str, consequence: str = "") -> NoReturn:
    """Refuse folders that may be classes or not. Raises: DataError with both options."""
    names = dict.fromkeys(folder.name for parent in parents for folder in parent.filled_folders)
    raise DataError(
        f"{tree.path}: {problem}; state --labels {NO_LABELS} to pack all images without labels, or --labels "
        f"{FOLDER_LABELS} if {list_some(list(names))} {'are classes' if len(names) > 1 else 'is a class'} with all images "
        f"below{consequence}"
    )


def _image_folders(folder: ImageFolder) -> Iterable[ImageFolder]:
    """Yield the folders that have images directly in them."""
    if folder.images:
        yield folder
    for inner in folder.filled_folders:
        yield from _image_folders(inner)


def _name_paths(tree: ImageFolder, folders: Iterable[ImageFolder]) -> str:
    return list_some([folder.path.relative_to(tree.path).as_posix() for folder in folders])
