"""Masks and other labels among the images of a folder: files in formats of images that are no images of a class."""

import re
from collections.abc import Iterable, Iterator, Sequence

from foveal.data.format.image_fields import says_label
from foveal.data.pack.image_tree import ImageFile, ImageFolder, PassedOver
from foveal.data.pack.split_names import fold_case
from foveal.errors import DataError

_CHOICES = ("skip", "pack")
# Words that say of a name that it is of images, such as image_0 beside mask_0, and photos/ beside masks/.
_IMAGE_WORD = (
    r"(?:jpe?g)?(?:images?|imgs?|img|rgb|photos?|pictures?|frames?|inputs?|originals?|raw|colou?r|leftimg8bit)"
)
_IMAGE_PART = re.compile(rf"(?:^|[ ._-]){_IMAGE_WORD}(?:$|[ ._-])")
_IMAGE_AT_AN_END = re.compile(rf"^{_IMAGE_WORD}(?:[ ._-]+|$)|[ ._-]+{_IMAGE_WORD}$")
_MORE_LABEL_WORDS = re.compile(r"ground_?truth|(?<![a-z])(?:manual|annots?|annos?)(?![a-z])")
_NO_LABEL = re.compile(r"normals?")  # surface normals, but rather the class of those who are not ill


def leave_out_label_images(
    tree: ImageFolder, choice: str | None, passed_over: PassedOver, *, compare_top: bool
) -> ImageFolder:
    """Return the folder without masks and other labels of its images, which are known by their names; count them.

    They are files such as a_mask.png beside a.png, and folders such as masks/ beside images/. choice: the option
    ``masks``: 'skip' leaves them out, 'pack' takes them as images, None asks. compare_top: whether folders directly in
    ``tree`` are compared; they are not if it is stated what they are.
    Raises: DataError if there are such files and no choice.
    """
    if choice is not None and choice not in _CHOICES:
        raise DataError(f"--masks {choice}: state {' or '.join(_CHOICES)}")
    if choice == "pack":
        return tree
    labels = list(find_label_images(tree, compare_top))
    if not labels:
        return tree
    if choice is None:
        raise DataError(
            f"{tree.path}: {len(labels):,} of {sum(1 for _ in tree.walk()):,} images are named as masks or other labels "
            f"of images beside them, such as {labels[0].path.relative_to(tree.path)}: state --masks skip to leave them "
            f"out, or --masks pack if they are images like the others; `foveal data pack masks` packs images with masks"
        )
    for file in labels:
        passed_over.add("masks and other labels of images", file.path.name)
    return _without(tree, set(labels))


def find_label_images(folder: ImageFolder, compare_folders: bool = True) -> Iterator[ImageFile]:
    """Yield the files in a folder and below that are labels by their own names, or by those of their folders."""
    stems = [file.path.stem for file in folder.images]
    if _says_label(".".join(stems)):  # one search for a folder without labels
        bases = _index_names(stems)
        yield from (file for file in folder.images if _find_image_name(file.path.stem, bases) is not None)
    label_folders = _find_label_folders(folder.filled_folders) if compare_folders else []
    for inner in folder.filled_folders:
        yield from inner.walk() if inner in label_folders else find_label_images(inner)


def _find_label_folders(folders: Sequence[ImageFolder]) -> list[ImageFolder]:
    """Return the folders whose names say that they hold labels of the images in a folder beside them.

    A name alone does not say it: gas_mask is a class. There is also a folder of that name without the word, a folder
    that is named as one of images, or one with images of the same names; exactly one if the name has other words, since
    images of all classes may be numbered.
    """
    labels = [folder for folder in folders if _says_label(folder.name)]
    others = [folder for folder in folders if folder not in labels]
    if not labels or not others:
        return []
    if any(_IMAGE_PART.search(fold_case(folder.name)) for folder in others):
        return labels
    bases = _index_names(folder.name for folder in others)
    stems = [_index_names(file.path.stem for file in folder.walk()) for folder in others]
    return [
        folder
        for folder in labels
        if _find_image_name(folder.name, bases) is not None
        or (num_paired := sum(_is_paired(folder, names) for names in stems)) == 1
        or (num_paired and _says_only_label(folder.name))
    ]


def _is_paired(folder: ImageFolder, bases: dict[str, str]) -> bool:
    """Return whether at least half of a folder's files have the name of one of the images."""
    names = [file.path.stem for file in folder.walk()]
    num_paired = sum(fold_case(name) in bases or _find_image_name(name, bases) is not None for name in names)
    return 2 * num_paired >= len(names)


def _index_names(names: Iterable[str]) -> dict[str, str]:
    """Return names by their forms for comparison, with and without a word for images at an end."""
    index: dict[str, str] = {}
    for name in map(fold_case, names):
        index[name] = name
        index.setdefault(_IMAGE_AT_AN_END.sub("", name), name)
    return index


def _find_image_name(name: str, bases: dict[str, str]) -> str | None:
    """Return the name of the image whose label a name says to be: 'a' of 'a_mask', 'image_0' of 'mask_0'; or None."""
    if not _says_label(name):
        return None
    name = fold_case(name)
    parts = [("", name)] if not re.search(r"\d", name) else []  # label.png and label_viz.png beside img.png
    for separator in re.finditer(r"[ ._-]+", name):
        head, tail = name[: separator.start()], name[separator.end() :]
        parts += [(head, tail), (tail, head)]
    return next((bases[rest] for rest, label in parts if bases.get(rest, name) != name and _says_label(label)), None)


def _says_label(name: str) -> bool:
    return says_label(_NO_LABEL.sub("", _to_words(name)))


def _says_only_label(name: str) -> bool:
    return all(says_label(word) for word in _to_words(name).split("_"))


def _to_words(name: str) -> str:
    """Return a name for ``says_label``, with further words of labels as one that it knows."""
    return _MORE_LABEL_WORDS.sub("gt", re.sub(r"[ -]+", "_", fold_case(name)))


def _without(folder: ImageFolder, left_out: set[ImageFile]) -> ImageFolder:
    """Return a folder without files, and without the folders that held nothing else."""
    folders = [(inner, _without(inner, left_out)) for inner in folder.folders]
    return ImageFolder(
        folder.path,
        tuple(file for file in folder.images if file not in left_out),
        tuple(kept for inner, kept in folders if kept.has_images or not inner.has_images),
    )
