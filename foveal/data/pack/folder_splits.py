"""Which sub-folders of a folder of images are splits. Usual names are taken as splits; what is doubtful is asked."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from foveal.data.pack.image_tree import ImageFolder, PassedOver
from foveal.data.pack.split_names import check_split_name, fold_case, guess_split, recognize_split, split_rank
from foveal.errors import DataError

NO_SPLITS = "none"
_NO_CLASSES = "--labels none to pack all images without labels"
_MAX_COMPARED = 50  # class folders with a sub-folder of one name that further ones are compared with


def states_no_splits(stated: str | None) -> bool:
    """Return whether the option ``splits`` says that no folder is a split."""
    return stated is not None and stated.strip().lower() == NO_SPLITS


def choose_splits(
    tree: ImageFolder, stated: str | None, passed_over: PassedOver, *, with_classes: bool, are_classes_stated: bool
) -> dict[str, ImageFolder]:
    """Return the folders of the splits, training first; empty if no folder is a split.

    stated: the option ``splits``, None: by the folders' names. with_classes: whether folders may be classes.
    are_classes_stated: whether the folders that are no splits are classes by statement.
    Raises: DataError if the names leave open what is a split, or ``stated`` names no folder.
    """
    if states_no_splits(stated):
        return {}
    if stated is not None:
        return _find_stated(tree, stated, passed_over, with_classes)
    return _recognize_splits(tree, passed_over, with_classes, are_classes_stated)


def _recognize_splits(
    tree: ImageFolder, passed_over: PassedOver, with_classes: bool, are_classes_stated: bool
) -> dict[str, ImageFolder]:
    """Return the folders whose names are splits. Raises: DataError if the names, or what is below, leave it open."""
    kinds = {folder.path: recognize_split(folder.name) for folder in tree.folders}
    named = [folder for folder in tree.folders if kinds[folder.path]]
    others = [folder for folder in tree.filled_folders if not kinds[folder.path]]
    if not named:
        _refuse_hidden_splits(tree, with_classes)
        if with_classes and not are_classes_stated:
            _refuse_equal_sub_folders(tree)
        return {}
    splits: dict[str, ImageFolder] = {}
    for folder in named:
        other = splits.setdefault(str(kinds[folder.path]), folder)
        if other is not folder:
            _ask(tree, f"folders '{other.name}' and '{folder.name}' both name the split '{kinds[folder.path]}'")
    if others:
        do_not = "do not" if others[1:] else "does not"
        _ask(tree, f"{_name_splits(named)}, and {_names(others)} beside it {do_not}")
    if "train" not in splits:
        _ask(tree, f"{_name_splits(named)}, and there is no 'train'")
    for folder in splits.values() if with_classes else ():
        _refuse_hidden_classes(tree, splits, folder)
        if not are_classes_stated:
            _refuse_equal_sub_folders(folder, is_split=True)
    return _pass_over_others(tree, splits, "folders without images beside the splits", passed_over)


def _find_stated(tree: ImageFolder, stated: str, passed_over: PassedOver, with_classes: bool) -> dict[str, ImageFolder]:
    splits: dict[str, ImageFolder] = {}
    for part in stated.split(","):
        split, equals, name = (text.strip() for text in part.partition("="))
        folder = _find_folder(tree, name)
        if not equals or folder is None:
            problem = f"{tree.path} has no folder '{name}'" if equals else f"'{part}' is not SPLIT=FOLDER"
            raise DataError(
                f"--splits {stated}: {problem}; state splits as train=FOLDER,val=FOLDER, or {NO_SPLITS}; "
                f"there are: {_names(tree.folders) or 'no folders'}, and the folders in them, as FOLDER/SUB_FOLDER"
            )
        split = recognize_split(split) or check_split_name(split)
        if split in splits or folder in splits.values():
            raise DataError(f"--splits {stated}: '{part.strip()}' repeats a split or a folder")
        splits[split] = folder
    for folder in splits.values():
        if inner := next((other for other in splits.values() if folder.path in other.path.parents), None):
            raise DataError(f"--splits {stated}: {inner.path} lies in {folder.path}: an image is in one split only")
        if with_classes and _repeats_name(folder):
            _refuse_hidden_classes(tree, splits, folder)
    return _pass_over_others(tree, splits, "images in folders that --splits leaves out", passed_over)


def _find_folder(tree: ImageFolder, name: str) -> ImageFolder | None:
    """Return the folder with a name, or with a path such as 'seg_train/seg_train'; case counts only if it must."""
    folder: ImageFolder | None = tree
    for part in [part for part in name.split("/") if part not in ("", ".")]:
        exact = {inner.name: inner for inner in folder.folders}
        folder = exact.get(part) or {fold_case(inner.name): inner for inner in folder.folders}.get(fold_case(part))
        if folder is None:
            return None
    return None if folder is tree else folder


def _pass_over_others(
    tree: ImageFolder, splits: dict[str, ImageFolder], reason: str, passed_over: PassedOver
) -> dict[str, ImageFolder]:
    """Count what is in no split, folder by folder; return the splits in their order."""
    for folder in tree.folders:
        if folder in splits.values():
            continue
        inner = [split for split in splits.values() if folder.path in split.path.parents]
        count = sum(1 for _ in folder.walk()) - sum(1 for split in inner for _ in split.walk())
        passed_over.add(reason, folder.name, count if folder.has_images else 1)
    return dict(sorted(splits.items(), key=lambda pair: split_rank(pair[0])))


def _refuse_hidden_splits(tree: ImageFolder, with_classes: bool) -> None:
    """Refuse folders whose names contain a split's, and folders that have splits below. Raises: DataError."""
    folders = tree.filled_folders
    guesses = {folder.path: guess_split(folder.name) for folder in folders}
    if len({split for split in guesses.values() if split}) > 1:
        _ask(tree, f"{_names(folder for folder in folders if guesses[folder.path])} may be splits")
    for folder in folders:
        _refuse_splits_below(tree, folder, len(folders) == 1, with_classes)


def _refuse_splits_below(tree: ImageFolder, folder: ImageFolder, only: bool, with_classes: bool) -> None:
    """Refuse a folder that has splits in it, at any depth. only: whether it has all images. Raises: DataError."""
    kinds = {recognize_split(inner.name) or guess_split(inner.name): inner for inner in folder.filled_folders}
    if len(kinds.keys() - {None}) > 1 and "train" in kinds:
        named = [inner for split, inner in kinds.items() if split is not None]
        inside = folder.path.relative_to(tree.path).as_posix()
        remedy = (
            f"pack {folder.path}" if only else f"move the splits up, as in {tree.path / kinds['train'].name / inside}"
        )
        meaning = f"'{inside.partition('/')[0]}' is a class with all images below it" if with_classes else "they do not"
        raise DataError(
            f"{folder.path} has sub-folders that name splits ({_names(named)}): {remedy}, or state "
            f"--splits {NO_SPLITS} if {meaning}"
        )
    inner_folders = folder.filled_folders
    for inner in inner_folders:
        _refuse_splits_below(tree, inner, only and not folder.images and len(inner_folders) == 1, with_classes)


def _refuse_hidden_classes(tree: ImageFolder, splits: dict[str, ImageFolder], folder: ImageFolder) -> None:
    """Refuse a split with all images in one folder that has folders itself, its classes perhaps. Raises: DataError."""
    inside = _enter(folder)
    if not inside.filled_folders or inside is folder:
        return
    below = ",".join(f"{split}={_relative_path(tree, _enter(other))}" for split, other in splits.items())
    stated = ",".join(f"{split}={_relative_path(tree, other)}" for split, other in splits.items())
    name = folder.filled_folders[0].name
    remedy = "" if _repeats_name(folder) else f", --splits {stated} --labels folders if '{name}' is a class"
    raise DataError(
        f"{folder.path} has one folder only, '{_relative_path(folder, inside)}', which holds "
        f"{_names(inside.filled_folders)}: state --splits {below} if these are the classes{remedy}, or {_NO_CLASSES}"
    )


def _refuse_equal_sub_folders(parent: ImageFolder, *, is_split: bool = False) -> None:
    """Refuse class folders that have the same folders in them: these may be the classes. Raises: DataError.

    A single equal name, such as 'faces' in every class, is no reason. is_split: whether ``parent`` is a split.
    """
    with_name: dict[str, list[ImageFolder]] = {}
    for folder in parent.filled_folders:
        shared: dict[Path, list[str]] = {}
        for inner in _enter(folder).filled_folders:
            others = with_name.setdefault(fold_case(inner.name), [])
            for other in others:
                names = shared.setdefault(other.path, [])
                names.append(inner.name)
                if len(names) > 1:
                    _ask_about_equal_sub_folders(parent, (other, folder), names, is_split)
            if len(others) < _MAX_COMPARED:
                others.append(folder)


def _ask_about_equal_sub_folders(
    parent: ImageFolder, folders: tuple[ImageFolder, ImageFolder], shared: Sequence[str], is_split: bool
) -> NoReturn:
    first, second = folders
    paths = [_relative_path(parent, _enter(folder)) for folder in folders]
    other_classes = (
        "put the parts of a split into one folder per class"
        if is_split
        else f"name the folders of the splits, such as --splits train={paths[0]},val={paths[1]},"
    )
    raise DataError(
        f"{parent.path}: folders '{first.name}' and '{second.name}' have the same sub-folders, such as '{shared[0]}' and "
        f"'{shared[1]}': state {_NO_CLASSES}, or --labels folders if '{first.name}' and '{second.name}' are classes; "
        f"{other_classes} if '{shared[0]}' and '{shared[1]}' are"
    )


def _enter(folder: ImageFolder) -> ImageFolder:
    """Return the folder below in which several folders begin, past folders with a single one that is no class."""
    while len(folder.filled_folders) == 1 and not folder.images:
        inner = folder.filled_folders[0]
        if not inner.filled_folders and not _repeats_name(folder):
            break
        folder = inner
    return folder


def _repeats_name(folder: ImageFolder) -> bool:
    """Whether the only folder in a folder has its name, as two archives in each other give it."""
    inner = folder.filled_folders
    return len(inner) == 1 and not folder.images and fold_case(inner[0].name) == fold_case(folder.name)


def _relative_path(tree: ImageFolder, folder: ImageFolder) -> str:
    return folder.path.relative_to(tree.path).as_posix()


def _ask(tree: ImageFolder, problem: str) -> NoReturn:
    """Refuse names that leave open what is meant. Raises: DataError with the option that decides."""
    guesses = {"train": "FOLDER"}
    for folder in tree.filled_folders:
        split = guess_split(folder.name)
        if split is not None and guesses.get(split, "FOLDER") == "FOLDER":
            guesses[split] = _relative_path(tree, _enter(folder))
    example = ",".join(f"{split}={guesses[split]}" for split in sorted(guesses, key=split_rank))
    raise DataError(
        f"{tree.path}: {problem}; state --splits {NO_SPLITS} if none of the folders is a split, or the folders of the "
        f"splits, such as --splits {example} (folders that are not stated are left out)"
    )


def _name_splits(folders: Sequence[ImageFolder]) -> str:
    return f"{_names(folders)} {'name splits' if len(folders) > 1 else 'names a split'}"


def _names(folders: Iterable[ImageFolder]) -> str:
    names = [f"'{folder.name}'" for folder in folders]
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if names[5:] else "")
