"""Packing of images with the boxes of YOLO's text files: one file per image, a box in a line."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from foveal.data.indexing.class_names import read_class_names
from foveal.data.indexing.labels import check_class_names
from foveal.data.pack.box_dataset import BoxedImages, make_box_dataset
from foveal.data.pack.image_tree import PassedOver, scan_folder
from foveal.data.pack.options import PackOptions
from foveal.data.pack.paired_files import check_unpaired_choice
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset
from foveal.data.pack.split_names import SPLIT_ORDER, recognize_split
from foveal.data.pack.writer import map_in_order, write_dataset_if_absent
from foveal.errors import DataError
from foveal.strict_yaml import read_yaml

_NAMES_FILES = ("classes.txt", "obj.names")  # of labelling programs, without data.yaml
_COLUMNS = "class, centre x, centre y, width, height"
_ROUNDED = 1e-3  # by which a fraction may be outside of 0 and 1
_MAX_NAMED = 3

Rows = list[tuple[float, ...]]  # class, centre x, centre y, width, height of every box of an image


def pack_yolo(
    path: Path,
    output_folder: Path,
    *,
    classes: Sequence[str] | None = None,
    unpaired: str | None = None,
    **options: Any,
) -> bool:
    """Pack images with the boxes of YOLO's text files as shards in hashed order: a sample has the member ``json``.

    path: data.yaml, which states classes and splits, or a folder with it, or a folder of images/ and labels/ with splits
    in them or above them. The labels of images/a.jpg are labels/a.txt, or a.txt beside it; an image without such a file
    has no boxes. classes: their names, if no data.yaml or classes.txt states them. unpaired: 'skip' leaves out files of
    labels without image. Return whether the shards were written now.
    Raises: DataError if a line is no box, files are missing, or classes have no names, or as ``pack_folder``;
    ConfigError for invalid options or YAML.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    check_unpaired_choice(unpaired)
    folder = path.parent if path.is_file() else path

    def load_dataset() -> PackDataset:
        passed_over = PassedOver()
        description = path if path.is_file() else _find_description(folder)
        if description is not None:
            names, images = _read_description(description, classes, passed_over)
        else:
            names, images = _find_names(folder, classes), _list_folder(folder, output_folder, passed_over)
        splits = [
            _read_split(split, files, names, unpaired, pack_options.workers, passed_over)
            for split, files in images.items()
        ]
        num_unlabelled = sum(not _find_label_file(file).is_file() for files in images.values() for file in files)
        notes = [f"{num_unlabelled:,} images have no file of labels: they are packed without boxes"]
        return make_box_dataset(folder, names, splits, notes if num_unlabelled else [], pack_options, passed_over)

    settings = {"unpaired": unpaired, "classes": ",".join(classes) if classes else None}
    return write_dataset_if_absent(output_folder, PackSource("yolo", folder, settings), load_dataset, pack_options)


def _find_description(folder: Path) -> Path | None:
    """Return the only YAML file of a folder that states splits. Raises: DataError if several do."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, and no data.yaml")
    files = sorted(
        file for file in folder.iterdir() if file.suffix in (".yaml", ".yml") and not file.name.startswith(".")
    )
    trees = {file: read_yaml(file) for file in files}
    described = [file for file, tree in trees.items() if isinstance(tree, dict) and "train" in tree]
    if len(described) > 1:
        raise DataError(f"{described[0]} and {described[1].name} both state splits: give one of these files")
    return described[0] if described else None


def _read_description(
    file: Path, classes: Sequence[str] | None, passed_over: PassedOver
) -> tuple[tuple[str, ...], dict[str | None, list[Path]]]:
    """Return the classes and the images of every split that data.yaml states. Raises: DataError, ConfigError."""
    tree = read_yaml(file)
    if not isinstance(tree, dict) or "train" not in tree:
        raise DataError(f"{file} has no entry 'train', which states the folder of the images")
    if "kpt_shape" in tree:
        raise DataError(f"{file} describes keypoints (kpt_shape), and boxes are read")
    if classes is not None and "names" in tree:
        raise DataError(f"--classes and 'names' of {file} both give the class names: omit one")
    names = _check_names(classes if classes is not None else tree.get("names"), str(file))
    if "nc" in tree and tree["nc"] != len(names):
        raise DataError(f"{file} says nc: {tree['nc']} and has {len(names)} names")
    stated = Path(str(tree.get("path") or "."))
    base = file.parent / stated if (file.parent / stated).is_dir() else file.parent
    images: dict[str | None, list[Path]] = {}
    for split in SPLIT_ORDER:
        places = tree.get(split) or []
        files: list[Path] = []
        for place in places if isinstance(places, list) else [places]:
            found = _find_place(base, str(place))
            if found is None and split == "test":  # exported descriptions name it in any case
                passed_over.add("a split whose folder is missing", str(place))
            elif found is None:
                raise DataError(f"{file}: {split}: {place}, and there is no {base / str(place)}")
            else:
                files += _list_images(found, passed_over)
        if files:
            images[split] = files
        elif places and split != "test":
            raise DataError(f"{file}: {split}: {places}, and there is no image")
    return names, images


def _find_place(base: Path, place: str) -> Path | None:
    """Return the folder or list of a split; '../train/images' also in the folder itself, as exports have it."""
    candidates = [base / place, base / place.removeprefix("../")]
    return next((each for each in candidates if each.exists()), None)


def _list_images(place: Path, passed_over: PassedOver) -> list[Path]:
    """Return the images below a folder, or those that a text file lists, relative to it or to its folder."""
    if place.is_dir():
        return sorted(file.path for file in scan_folder(place, passed_over).walk())
    files: list[Path] = []
    for number, line in enumerate(_read_text(place).splitlines(), 1):
        if not line.strip():
            continue
        file = place.parent / line.strip()
        if not file.is_file():
            raise DataError(f"{place}, line {number}: there is no {file}")
        files.append(file)
    return files


def _list_folder(folder: Path, output: Path, passed_over: PassedOver) -> dict[str | None, list[Path]]:
    """Return the images below a folder by split, as folders name it; None: there are no splits. Raises: DataError."""
    images: dict[str | None, list[Path]] = {}
    for file in sorted(scan_folder(folder, passed_over, leave_out=output).walk()):
        parts = file.path.parent.relative_to(folder).parts
        images.setdefault(next(filter(None, map(recognize_split, parts)), None), []).append(file.path)
    if not images:
        raise DataError(f"{folder} holds no images: images/ and labels/ are expected in it, or a data.yaml")
    if None in images and len(images) > 1:
        raise DataError(
            f"{folder}: {images[None][0]} is in no folder of a split, and others are: state the splits in a data.yaml"
        )
    return images


def _find_names(folder: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes of a folder without data.yaml: those given, or in a file of names. Raises: DataError."""
    if classes is not None:
        return _check_names(list(classes), "--classes")
    for file in (inner / name for inner in (folder, folder / "labels") for name in _NAMES_FILES):
        if file.is_file():
            return _check_names(read_class_names("", file), str(file))
    raise DataError(
        f"{folder} has no data.yaml and no {' or '.join(_NAMES_FILES)}, so its classes have no names: state --classes "
        f"NAME,NAME,... in the order of their numbers, or --classes-file FILE"
    )


def _check_names(names: Any, place: str) -> tuple[str, ...]:
    """Return names that are a list, or an object from number to name. Raises: DataError."""
    if isinstance(names, Mapping):
        if list(names) != list(range(len(names))):
            raise DataError(f"{place}: 'names' has the numbers {', '.join(map(str, names))[:60]}: they count from 0")
        names = list(names.values())
    if not isinstance(names, list | tuple) or not names:
        raise DataError(f"{place}: 'names' is no list of class names: state them there, or with --classes")
    classes = tuple(str(name).strip() for name in names)
    check_class_names(classes)
    return classes


def _read_split(
    split: str | None,
    files: Sequence[Path],
    classes: Sequence[str],
    unpaired: str | None,
    workers: int,
    passed_over: PassedOver,
) -> BoxedImages:
    """Return images with the boxes of their label files. Raises: DataError that names file and line."""
    images = BoxedImages(split, are_fractions=True)
    label_files = [_find_label_file(file) for file in files]
    if not any(file.is_file() for file in label_files):
        raise DataError(f"none of {len(files):,} images has a file of labels: {files[0]} needs {label_files[0]}")
    _check_strays(label_files, unpaired, passed_over)
    read = partial(_read_rows, num_classes=len(classes))
    for file, label_file, rows in zip(files, label_files, map_in_order(read, label_files, workers), strict=True):
        distinct = list(dict.fromkeys(rows or []))
        passed_over.add("repeated lines of label files", label_file.name, len(rows or []) - len(distinct))
        images.files.append(file)
        images.annotations.append([{"bbox": list(row[1:]), "category_id": int(row[0])} for row in distinct])
        images.sizes.append(None)
    return images


def _find_label_file(image: Path) -> Path:
    """Return the path of an image's label file: in labels/ in place of the last images/, or beside the image."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = max(number for number, part in enumerate(parts[:-1]) if part == "images")
        file = Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
        if file.is_file() or not image.with_suffix(".txt").is_file():
            return file
    return image.with_suffix(".txt")


def _check_strays(label_files: Sequence[Path], unpaired: str | None, passed_over: PassedOver) -> None:
    """Count label files without image in the folders of the others. Raises: DataError if it is not said to skip them."""
    known = set(label_files)
    folders = sorted({file.parent for file in label_files})
    strays = [
        file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.glob("*.txt"))
        if file not in known and file.name not in _NAMES_FILES
    ]
    if strays and unpaired is None:
        names = ", ".join(file.name for file in strays[:_MAX_NAMED]) + (", ..." if strays[_MAX_NAMED:] else "")
        raise DataError(
            f"{strays[0].parent}: {len(strays):,} files of labels without image ({names}): state --unpaired skip to leave "
            f"them out"
        )
    for file in strays:
        passed_over.add("files of labels without image", file.name)


def _read_rows(file: Path, num_classes: int) -> Rows | None:
    """Return the boxes of a label file, None if there is no file. Raises: DataError that names the line."""
    if not file.is_file():
        return None
    rows: Rows = []
    for number, line in enumerate(_read_text(file).splitlines(), 1):
        cells = line.split()
        if not cells:
            continue
        try:
            row = tuple(float(cell) for cell in cells)
        except ValueError:
            row = ()
        if problem := _find_problem(row, num_classes):
            raise DataError(f"{file}, line {number}: '{line.strip()[:60]}' {problem}")
        rows.append(row)
    return rows


def _find_problem(row: Sequence[float], num_classes: int) -> str | None:
    """Return what is wrong with a line, or None."""
    if len(row) != 5:
        more = "; polygons and keypoints are not read" if len(row) > 5 else ""
        return f"is not five numbers, {_COLUMNS}{more}"
    label, *box = row
    if not label.is_integer() or not 0 <= label < num_classes:
        return f"has class {label:g}, and classes are 0 to {num_classes - 1}"
    if not all(isfinite(number) and -_ROUNDED <= number <= 1 + _ROUNDED for number in box):
        return f"has numbers that are not fractions of the image's sides, 0 to 1, as {_COLUMNS} are"
    return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error})") from None
