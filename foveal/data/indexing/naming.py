"""Names of a tar's members: where a key ends, and which names show that they were split at the wrong place."""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from foveal.data.format.image_fields import (
    IMAGE_EXTENSIONS,
    named_image_fields,
    says_label,
    split_image_field,
    strip_kind_words,
)

# Common fields of two parts (mask.png), whose first part is no part of a dotted key.
_FIRST_PARTS = "masks?|seg|segmentation|semantic|instances?|panoptic|labels?|depth|normals?|edges?|flow"
LABEL_FIELDS = ("cls", "json", "txt")  # common fields beside the image
_COMMON_FIELDS = {*IMAGE_EXTENSIONS, *LABEL_FIELDS}  # fields that show where a key with dots ends
# Words of a field that may hold a class and is not read, as in label.txt, jpg.json (of Takeout) or class.
_CLASS_WORDS = {"cls", "class", "classes", "label", "labels", "category", "target", "meta", "metadata", "info"}
_CLASS_WORDS |= set(IMAGE_EXTENSIONS)


class TarSample(NamedTuple):
    """Sample of a shard: (offset, size) of its members by field, and its label (-1: none)."""

    key: str
    offset_size_by_field: dict[str, tuple[int, int]]
    label: int


def dotted_name_pattern(image_field: str | None) -> re.Pattern[str]:
    """Return the pattern of key and field where the last dot ends the key, except before fields of two parts."""
    name = split_image_field(image_field or "")[0]
    first_parts = f"{_FIRST_PARTS}|{re.escape(name)}" if name else _FIRST_PARTS
    return re.compile(rf"((?:.*/)?[^./][^/]*?)\.((?:(?:{first_parts})\.)?[^./]+)", re.DOTALL | re.IGNORECASE)


def has_common_field_behind_dot(fields: Iterable[str]) -> bool:
    """Whether the last dot of a field may end a key, because a common field follows it."""
    matches = (dotted_name_pattern(None).fullmatch(f"key.{field}") for field in fields)
    return any(match and match[1] != "key" and match[2].lower() in _COMMON_FIELDS for match in matches)


def has_key_with_dots(fields: Iterable[str]) -> bool:
    """Whether fields look like the end of a key with dots: 001.jpg, or v2.jpg beside v2.cls."""
    fields = set(fields)
    return has_dotted_label(fields) or any(
        split_image_field(field)[0].isdecimal() for field in named_image_fields(fields)
    )


def has_dotted_label(fields: Iterable[str]) -> bool:
    """Whether fields have an image and a label under one name, as in v2.jpg and v2.cls."""
    fields = set(fields)
    names = [split_image_field(field)[0] for field in named_image_fields(fields)]
    return any(f"{name}.{label}" in fields for name in names for label in LABEL_FIELDS)


def may_hold_class(field: str) -> bool:
    """Whether a field that no option reads, such as label.txt, may hold the class of the image by its name."""
    words = re.split(r"[._-]", field.lower())
    return field == "txt" or (
        field not in LABEL_FIELDS and words[-1] not in IMAGE_EXTENSIONS and not _CLASS_WORDS.isdisjoint(words)
    )


def find_twins(samples: list[TarSample], *, dotted: bool) -> list[str]:
    """Return the keys of samples that may be labels of other samples, by their names.

    These are masks/KEY beside images/KEY, KEY_mask beside KEY, mask_0 beside image_0, and KEY.x beside KEY.
    """
    places = [sample.key.rpartition("/")[::2] for sample in samples]
    label_folders = _find_label_folders({folder for folder, _ in places})
    has_label_word = [says_label(name) for _, name in places]
    names: set[str] = set()  # of samples outside of folders of labels
    stems: set[str] = set()  # of those of them that are images by their names
    if label_folders or any(has_label_word):
        names = {name for folder, name in places if folder not in label_folders}
        for (folder, name), is_label in zip(places, has_label_word, strict=True):
            if folder not in label_folders and not is_label:
                stems |= _stems(folder, name)
    keys = {sample.key for sample in samples} if dotted else set()
    twins = []
    for sample, (folder, name), is_label in zip(samples, places, has_label_word, strict=True):
        has_own_label = not sample.offset_size_by_field.keys().isdisjoint(LABEL_FIELDS)
        if folder in label_folders:
            is_twin = "cls" not in sample.offset_size_by_field and (
                name in names or not stems.isdisjoint(_stems(folder, name))
            )
        else:
            is_twin = is_label and not has_own_label and not stems.isdisjoint(_stems(folder, name))
        if is_twin or (not has_own_label and sample.key.rpartition(".")[0] in keys):
            twins.append(sample.key)
    return twins


def _find_label_folders(folders: set[str]) -> set[str]:
    """Return the folders whose path, below the path that all have in common, says that they hold labels."""
    paths = {folder: folder.split("/") for folder in folders}
    levels = zip(*paths.values(), strict=False)
    common = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, levels)))
    siblings: dict[tuple[str, ...], set[str]] = {}
    for parts in paths.values():
        for level in range(common, len(parts)):
            siblings.setdefault(tuple(parts[:level]), set()).add(parts[level])
    return {
        folder
        for folder, parts in paths.items()
        if any(
            _is_label_folder(parts[level], siblings[tuple(parts[:level])])
            for level in range(common, len(parts))
            if says_label(parts[level])
        )
    }


def _is_label_folder(name: str, siblings: set[str]) -> bool:
    """Whether a folder named by a word for labels holds labels: 'normal' does beside rgb, and is a class beside sick."""
    return name.lower() != "normal" or any(
        strip_kind_words(other) == {""} and not says_label(other) for other in siblings
    )


def _stems(folder: str, name: str) -> set[str]:
    """Return what names of an image and its label share; a name of such words only, as 7/mask, is one in its folder."""
    return {stem or f"{folder}/" for stem in strip_kind_words(name)}


def describe_without_image(sample: TarSample) -> str:
    """Return that a sample has no image, with its members."""
    return (
        f"sample '{printable_key(sample.key)}' has no image, its members are: {', '.join(sample.offset_size_by_field)}"
    )


def printable_key(key: str) -> str:
    """Return a key without surrogates, which stand for bytes that are no UTF-8."""
    return key.encode(errors="surrogateescape").decode(errors="backslashreplace")
