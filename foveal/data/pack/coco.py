"""Packing of images with the boxes of COCO's JSON files, one file per split."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveal.data.pack.box_dataset import BoxedImages, make_box_dataset
from foveal.data.pack.image_tree import IMAGE_SUFFIXES, PassedOver
from foveal.data.pack.options import PackOptions
from foveal.data.pack.paired_files import check_unpaired_choice
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset
from foveal.data.pack.split_names import guess_split, normalize_split_names, recognize_split
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError

_NUM_TRIED = 64  # names of images that decide in which folder they are
_MAX_NAMED = 3


def pack_coco(
    image_folder: Path,
    output_folder: Path,
    annotation_files: Sequence[str],
    *,
    unpaired: str | None = None,
    **options: Any,
) -> bool:
    """Pack images with the boxes of COCO's JSON files as shards in hashed order: a sample has the member ``json``.

    annotation_files: one file per split, which its name tells (instances_train2017.json) or that of its folder, or as
    SPLIT=FILE; a single file without a split's name is divided by ``val_fraction``. Images are looked for in
    ``image_folder``, in its folders with the split's name, and beside the file. Categories become classes in the order
    of their ids. Images without annotations are packed. unpaired: 'skip' leaves out images without file. Return whether
    the shards were written now.
    Raises: DataError if a file has another form, files disagree, or an image is missing, or as ``pack_folder``;
    ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    check_unpaired_choice(unpaired)

    def load_dataset() -> PackDataset:
        passed_over = PassedOver()
        classes, splits, notes = _read_splits(image_folder, annotation_files, unpaired, passed_over)
        return make_box_dataset(image_folder, classes, splits, notes, pack_options, passed_over)

    source = PackSource("coco", image_folder, {"unpaired": unpaired})
    return write_dataset_if_absent(output_folder, source, load_dataset, pack_options)


def _read_splits(
    folder: Path, annotation_files: Sequence[str], unpaired: str | None, passed_over: PassedOver
) -> tuple[tuple[str, ...], list[BoxedImages], list[str]]:
    """Return classes, splits, and what was understood. Raises: DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    named = _name_splits(annotation_files)
    notes: list[str] = []
    splits: list[BoxedImages] = []
    first: tuple[Path, dict[int, str]] | None = None
    for split, file in named:
        tree = _read_json(file)
        categories = _read_categories(tree, file)
        if first is None:
            first = (file, categories)
            notes += _describe_ids(categories)
        elif categories != first[1]:
            different = min(set(categories.items()) ^ set(first[1].items()))
            raise DataError(
                f"{file} and {first[0]} have different categories, such as id {different[0]} '{different[1]}' in one of "
                f"them: all splits have one list of categories"
            )
        splits.append(_read_images(folder, split, file, tree, categories, unpaired, passed_over))
    for name in _list_unlisted(splits):
        passed_over.add("images that no annotation file lists", name)
    assert first is not None
    return tuple(name for _, name in sorted(first[1].items())), splits, notes


def _name_splits(annotation_files: Sequence[str]) -> list[tuple[str | None, Path]]:
    """Return the split and the path of every file. Raises: DataError if files have no split's name, or one."""
    named: list[tuple[str | None, Path]] = []
    for text in annotation_files:
        split, equals, path = text.partition("=")
        if equals and re.fullmatch(r"[\w-]+", split) and not Path(text).exists():
            named.append((next(iter(normalize_split_names([split]).values())), Path(path)))
        else:
            file = Path(text)
            guess = guess_split(file.stem) or recognize_split(file.resolve().parent.name)
            named.append((None if guess == "predict" else guess, file))
    for split, file in named:
        same = [other for name, other in named if name == split]
        if len(same) > 1:
            files = " and ".join(str(other) for other in same[:2])
            of = f"both of the split '{split}' by their names" if split else "of no split by their names"
            raise DataError(f"{files} are {of}: state the splits, as in train={same[0]} val={same[1]}")
        if split is None and len(named) > 1:
            raise DataError(f"{file}: its name is of no split: state it, as in train={file}")
    return named


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error})") from None
    for name in ("images", "annotations", "categories"):
        entries = tree.get(name) if isinstance(tree, dict) else None
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise DataError(f"{file} has no list '{name}' of objects, as COCO's files of instances have")
    return tree


def _read_categories(tree: Mapping[str, Any], file: Path) -> dict[int, str]:
    """Return the names of categories by id. Raises: DataError for an id or a name that comes twice."""
    categories: dict[int, str] = {}
    for each in tree["categories"]:
        number, name = each.get("id"), each.get("name")
        if type(number) is not int or not isinstance(name, str) or not name.strip():
            raise DataError(f"{file}: category {str(each)[:60]} has no id, a whole number, and name, a text")
        if number in categories or name in categories.values():
            raise DataError(f"{file}: category id {number} or name '{name}' comes twice: give every category its own")
        categories[number] = name
    if not categories:
        raise DataError(f"{file} has no categories")
    return categories


def _describe_ids(categories: Mapping[int, str]) -> list[str]:
    ids = sorted(categories)
    if ids == list(range(len(ids))):
        return []
    gaps = ", with gaps" if ids[-1] - ids[0] >= len(ids) else ""
    return [f"category ids {ids[0]} to {ids[-1]}{gaps}, are classes 0 to {len(ids) - 1} in their order"]


def _read_images(
    folder: Path,
    split: str | None,
    file: Path,
    tree: Mapping[str, Any],
    categories: Mapping[int, str],
    unpaired: str | None,
    passed_over: PassedOver,
) -> BoxedImages:
    """Return the images of a file with their annotations. Raises: DataError."""
    boxes = _group_annotations(file, tree, categories)
    entries: dict[str, Mapping[str, Any]] = {}
    ids: set[Any] = set()
    for entry in tree["images"]:
        name = entry.get("file_name")
        if not isinstance(name, str) or not isinstance(entry.get("id"), int | str):
            raise DataError(f"{file}: image {str(entry)[:60]} has no id and file_name")
        if name in entries or entry["id"] in ids:
            what = f"file_name {name}" if name in entries else f"id {entry['id']}"
            raise DataError(f"{file}: two images have the {what}: an image is listed once, with all its annotations")
        ids.add(entry["id"])
        entries[name] = entry
    images = BoxedImages(split)
    root = _find_root(folder, split, file, list(entries))
    missing: list[str] = []
    for name, entry in entries.items():
        path = root / name
        if not path.is_file():
            missing.append(name)
            passed_over.add("images without file", name)
            continue
        images.files.append(path)
        images.annotations.append(boxes.pop(entry["id"], []))
        width, height = entry.get("width"), entry.get("height")
        images.sizes.append((width, height) if type(width) is int and type(height) is int else None)
    if missing and (unpaired is None or not images.files):
        names = ", ".join(missing[:_MAX_NAMED]) + (", ..." if missing[_MAX_NAMED:] else "")
        raise DataError(
            f"{file}: {len(missing):,} of {len(entries):,} images are not in {root} ({names}): complete the folder, or "
            f"leave these images out with --unpaired skip"
        )
    strangers = [number for number in boxes if number not in ids]
    for number in strangers:
        passed_over.add("annotations of images that are not listed", f"image_id {number}", len(boxes[number]))
    if not images.files:
        raise DataError(f"{file} lists no images")
    return images


def _group_annotations(
    file: Path, tree: Mapping[str, Any], categories: Mapping[int, str]
) -> dict[Any, list[dict[str, Any]]]:
    """Return the boxes of every image by its id, with classes in place of categories. Raises: DataError."""
    position = {number: label for label, number in enumerate(sorted(categories))}
    boxes: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for each in tree["annotations"]:
        bbox, category, crowd = each.get("bbox"), each.get("category_id"), each.get("iscrowd", 0)
        if not isinstance(each.get("image_id"), int | str) or not isinstance(bbox, list) or len(bbox) != 4:
            raise DataError(
                f"{file}: annotation {str(each)[:80]} has no image_id and bbox of four numbers: files of instances have "
                f"them, those of captions and panoptic segments have not"
            )
        if type(category) is not int or category not in position:
            raise DataError(
                f"{file}: annotation {str(each)[:80]} has category_id {category!r:.20}, which is no category"
            )
        box = {"bbox": bbox, "category_id": position[category]}
        boxes[each["image_id"]].append({**box, "iscrowd": crowd} if crowd else box)
    return boxes


def _find_root(folder: Path, split: str | None, file: Path, names: Sequence[str]) -> Path:
    """Return the folder that has the most of the first named images: the given one, a split's, or the file's own."""
    inner = [each for each in _walk_folders(folder, 2) if split is not None and recognize_split(each.name) == split]
    deeper = [each / "images" for each in inner] + [folder / "images"]
    roots = [folder, *inner, *deeper, file.parent]
    return max(roots, key=lambda root: sum((root / name).is_file() for name in names[:_NUM_TRIED]))


def _walk_folders(folder: Path, depth: int) -> Iterator[Path]:
    for inner in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        yield inner
        if depth > 1:
            yield from _walk_folders(inner, depth - 1)


def _list_unlisted(splits: Sequence[BoxedImages]) -> list[str]:
    """Return the names of image files in the folders of the splits' images that no split lists."""
    listed = {file for images in splits for file in images.files}
    return [
        file.name
        for folder in sorted({file.parent for file in listed})
        for file in sorted(folder.iterdir())
        if file.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES
        and file not in listed
        and not file.name.startswith(".")
    ]
