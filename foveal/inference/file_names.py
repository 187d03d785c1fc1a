"""Names of PNG files for images: one for each image, by which people recognise it."""

import re
from pathlib import PurePosixPath

from foveal.inference.image_inputs import ImageList

_MAX_STEM = 50  # characters of up to 4 bytes; a file system allows 255 bytes
_UNSAFE = re.compile(r"[^\w.-]+")


def make_file_names(images: ImageList) -> list[str]:
    """Return a file name for each image: its stem, with the image's number where two would be the same.

    Names differ also where letters' case does not count.
    """
    stems = [_make_stem(images[position].name) for position in range(len(images))]
    repeated = _find_repeated(stems)
    names, taken = list[str](), {stem.casefold() for stem in stems}
    for position, stem in enumerate(stems):
        name = stem
        if stem.casefold() in repeated:
            name = f"{stem}-{position:06d}"
            while name.casefold() in taken:
                name += "_"
            taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def _make_stem(name: str) -> str:
    """Return the end of a path, URL or SHARD.tar#KEY without its suffix, in letters, digits, dots and dashes."""
    shard, mark, key = name.rpartition(".tar#")
    stem = key.rpartition("/")[2] if mark and shard else PurePosixPath(name).stem
    return _UNSAFE.sub("_", stem)[:_MAX_STEM].lstrip(".") or "image"


def _find_repeated(stems: list[str]) -> set[str]:
    seen, repeated = set[str](), set[str]()
    for stem in stems:
        folded = stem.casefold()
        (repeated if folded in seen else seen).add(folded)
    return repeated
