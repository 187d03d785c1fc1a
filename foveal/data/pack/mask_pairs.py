"""Images and their masks: which files of a source are masks, and which mask is of which image."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from foveal.data.format.image_fields import strip_kind_words
from foveal.data.pack.image_tree import IMAGE_SUFFIXES, ImageFile, ImageFolder, PassedOver, scan_folder
from foveal.data.pack.label_images import find_label_images
from foveal.data.pack.split_names import fold_case, recognize_split
from foveal.errors import DataError

# A folder such as trainannot beside train, and its split.
_SPLIT_AND_LABEL = re.compile(r"(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?:annots?|masks?|labels?|gts?|segs?)")
_VOC_LISTS = Path("ImageSets", "Segmentation")  # of Pascal VOC: one file of names per split
_VOC_INSTANCES = "segmentationobject"
_MAX_NAMED = 3

Place = tuple[str, ...]  # folders between source and file, without words for images and masks


class PlacedFile(NamedTuple):
    """An image file, and the place where its counterpart is expected."""

    file: ImageFile
    place: Place

    @property
    def stem(self) -> str:
        """Return the file's name without its suffix."""
        return self.file.path.stem


@dataclass(frozen=True)
class MaskPair:
    """An image and its mask. kind: the mask's name with * for the image's; split: as its folders or a list name it."""

    image: ImageFile
    mask: ImageFile
    kind: str
    split: str | None


def find_pairs(
    images: Path,
    masks: Path | None,
    output: Path,
    mask_suffix: str | None,
    unpaired: str | None,
    passed_over: PassedOver,
) -> list[MaskPair]:
    """Return images and masks in the order of the images' paths; count in ``passed_over`` what is left out.

    masks None: both are below ``images``, and masks are known by the names of files and folders. Pairs have one place
    and one name, apart from words such as mask and an ending of the mask's name. mask_suffix: the masks whose names end
    so; unpaired: 'skip' leaves out images without mask and masks without image.
    Raises: DataError if there are no masks, an image has several, or one has none.
    """
    image_files, mask_files = _list_files(images, masks, output, passed_over)
    if mask_suffix is not None:
        stem, _, suffix = mask_suffix.rpartition(".")
        ending = stem if suffix.lower() in IMAGE_SUFFIXES else mask_suffix
        others = [mask for mask in mask_files if not mask.stem.endswith(ending)]
        mask_files = [mask for mask in mask_files if mask not in others]
        _pass_over(others, f"masks whose names do not end in {mask_suffix}", passed_over)
    listed_splits = _read_voc_lists((images if masks is None else images.parent) / _VOC_LISTS)
    if listed_splits:
        unlisted = [each for each in image_files if fold_case(each.stem) not in listed_splits]
        _pass_over(unlisted, f"images that no list in {_VOC_LISTS} names", passed_over)
        image_files = [each for each in image_files if fold_case(each.stem) in listed_splits]
        mask_files = [each for each in mask_files if fold_case(each.stem) in listed_splits]
    source = f"{images}" if masks is None else f"{images} and {masks}"
    if not image_files or not mask_files:
        raise DataError(
            f"{source}: {len(image_files):,} images and {len(mask_files):,} masks: state the folder of the images and "
            f"that of the masks, as in `foveal data pack masks IMAGES MASKS`"
        )
    matched, strays = _match(image_files, mask_files)
    _refuse_several_masks(source, matched)
    without_mask = [image for image in image_files if image.file not in matched]
    if unpaired is None and (without_mask or strays):
        raise DataError(
            f"{source}: {_count(without_mask, 'images', 'mask', images)}, {_count(strays, 'masks', 'image', masks or images)}: "
            f"a mask has its image's name, perhaps with an ending; state --unpaired skip to leave these files out"
        )
    _pass_over(without_mask, "images without mask", passed_over)
    _pass_over(strays, "masks without image", passed_over)
    if not matched:
        raise DataError(f"{source}: no image has a mask of its name, such as {image_files[0].file.path}")
    return [
        MaskPair(
            image.file,
            mask.file,
            kind,
            listed_splits.get(fold_case(image.stem)) or next(filter(None, map(recognize_split, image.place)), None),
        )
        for image in image_files
        if image.file in matched
        for mask, kind in matched[image.file]
    ]


def _list_files(
    images: Path, masks: Path | None, output: Path, passed_over: PassedOver
) -> tuple[list[PlacedFile], list[PlacedFile]]:
    """Return the images and the masks of a source."""
    for folder in (images, masks):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    tree = scan_folder(images, passed_over, leave_out=output)
    if masks is None or masks.resolve() == images.resolve():
        is_mask = {*find_label_images(tree), *_walk_label_splits(tree)}
        mask_files = [file for file in tree.walk() if file in is_mask]
        is_voc = any(file.path.parent.name == "SegmentationClass" for file in mask_files)
        instances = [file for file in mask_files if is_voc and fold_case(file.path.parent.name) == _VOC_INSTANCES]
        for file in instances:
            passed_over.add("masks of instances", file.path.name)
        kept = [file for file in mask_files if file not in set(instances)]
        return _place(images, (file for file in tree.walk() if file not in is_mask)), _place(images, kept)
    mask_tree = scan_folder(masks, passed_over, leave_out=output)
    image_paths, mask_paths = ({file.real_path for file in each.walk()} for each in (tree, mask_tree))
    shared = image_paths & mask_paths  # one folder in the other belongs to itself
    inner_is_masks = images.resolve() in masks.resolve().parents
    return (
        _place(images, (file for file in tree.walk() if not inner_is_masks or file.real_path not in shared)),
        _place(masks, (file for file in mask_tree.walk() if inner_is_masks or file.real_path not in shared)),
    )


def _walk_label_splits(tree: ImageFolder) -> Iterator[ImageFile]:
    """Yield the files in folders such as trainannot beside train."""
    names = {fold_case(folder.name) for folder in tree.folders}
    for folder in tree.folders:
        match = _SPLIT_AND_LABEL.fullmatch(fold_case(folder.name))
        yield from folder.walk() if match is not None and match[1] in names else _walk_label_splits(folder)


def _place(root: Path, files: Iterable[ImageFile]) -> list[PlacedFile]:
    """Return files with their places below a folder, by path."""
    places: dict[Path, Place] = {}
    placed: list[PlacedFile] = []
    for file in sorted(files, key=lambda file: file.path):
        folder = file.path.parent
        if folder not in places:
            names = map(_strip_folder_name, folder.relative_to(root).parts)
            places[folder] = tuple(name for name in names if name)
        placed.append(PlacedFile(file, places[folder]))
    return placed


def _strip_folder_name(name: str) -> str:
    """Return a folder's name without words for images and masks: 'train' for train_masks, '' for images."""
    name = fold_case(name)
    match = _SPLIT_AND_LABEL.fullmatch(name)
    stripped = match[1] if match else max(strip_kind_words(name), key=len)
    return recognize_split(stripped) or stripped


def _match(
    images: Sequence[PlacedFile], masks: Sequence[PlacedFile]
) -> tuple[dict[ImageFile, list[tuple[PlacedFile, str]]], list[PlacedFile]]:
    """Return the masks of every image, with their kinds, and the masks that are of no image.

    Raises: DataError for two images of one name.
    """
    exact: dict[tuple[Place, str], PlacedFile] = {}
    stripped: dict[tuple[Place, str], PlacedFile | None] = {}  # None: several images
    for image in images:
        other = exact.setdefault((image.place, fold_case(image.stem)), image)
        if other is not image:
            raise DataError(
                f"{other.file.path} and {image.file.path} have one name, and a mask belongs to one image: rename one of "
                f"them, or leave it out"
            )
        for name in strip_kind_words(fold_case(image.stem)):
            key = (image.place, name)
            stripped[key] = image if stripped.setdefault(key, image) is image else None
    matched: dict[ImageFile, list[tuple[PlacedFile, str]]] = {}
    strays: list[PlacedFile] = []
    for mask in masks:
        stem = fold_case(mask.stem)
        names = [stem, *sorted(strip_kind_words(stem), key=len, reverse=True), *_heads(stem)]
        found = ((exact.get((mask.place, name)) or stripped.get((mask.place, name)), name) for name in names if name)
        image, name = next(((image, name) for image, name in found if image is not None), (None, ""))
        if image is None:
            strays.append(mask)
        else:
            matched.setdefault(image.file, []).append((mask, stem.replace(name, "*", 1)))
    return matched, strays


def _heads(stem: str) -> Iterator[str]:
    """Yield the beginnings of a name before an ending in letters: 'a_b' and 'a' of 'a_b_c'; a number may count images."""
    for separator in reversed(list(re.finditer(r"[ ._-]+", stem))):
        if re.search(r"[a-z]", stem[separator.end() :]):
            yield stem[: separator.start()]


def _refuse_several_masks(source: str, matched: dict[ImageFile, list[tuple[PlacedFile, str]]]) -> None:
    """Raise DataError if an image has several masks, with their kinds and the option that chooses one."""
    several = [found for found in matched.values() if len(found) > 1]
    if not several:
        return
    kinds = Counter(kind for found in several for _, kind in found)
    listed = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(_MAX_NAMED + 2))
    ending = next((kind.rpartition("*")[2] for kind, _ in kinds.most_common() if kind.rpartition("*")[2]), "_mask")
    first, second = (mask.file.path for mask, _ in several[0][:2])
    raise DataError(
        f"{source}: {len(several):,} images have several masks, such as {first} and {second}, of the kinds {listed}: "
        f"state which with --mask-suffix {ending}"
    )


def _read_voc_lists(folder: Path) -> dict[str, str]:
    """Return the split of every image that Pascal VOC's lists train.txt, val.txt and test.txt name; empty without."""
    splits: dict[str, str] = {}
    for split in ("train", "val", "test"):
        file = folder / f"{split}.txt"
        if not file.is_file():
            continue
        for name in file.read_text().split():
            if splits.setdefault(fold_case(name), split) != split:
                raise DataError(
                    f"{file} names {name}, and so does {splits[fold_case(name)]}.txt: an image has one split"
                )
    return splits


def _count(files: Sequence[PlacedFile], noun: str, counterpart: str, root: Path) -> str:
    """Return how many files have no counterpart, and the first of them."""
    names = ", ".join(each.file.path.relative_to(root).as_posix() for each in files[:_MAX_NAMED])
    more = ", ..." if len(files) > _MAX_NAMED else ""
    return f"{len(files):,} {noun} without {counterpart}" + (f" ({names}{more})" if files else "")


def _pass_over(files: Iterable[PlacedFile], reason: str, passed_over: PassedOver) -> None:
    for each in files:
        passed_over.add(reason, each.file.path.name)
