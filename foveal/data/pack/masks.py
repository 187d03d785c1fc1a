"""Packing of images with masks: a class for every pixel."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from foveal.data.image.decode import UndecodableError
from foveal.data.image.masks import MaskReader
from foveal.data.indexing.labels import check_class_names
from foveal.data.pack.folder import make_file_sample
from foveal.data.pack.image_tree import PassedOver
from foveal.data.pack.label_member import ImageSize
from foveal.data.pack.mask_member import IGNORE_ID, MASK_FIELD, MaskMember, decode_ids, list_ids, parse_id_map
from foveal.data.pack.mask_pairs import MaskPair, find_pairs
from foveal.data.pack.options import PackOptions
from foveal.data.pack.paired_files import check_unpaired_choice, digest_files, name_dataset
from foveal.data.pack.record import PackSource
from foveal.data.pack.source import PackDataset, PackSample, build_splits, hashed_order
from foveal.data.pack.writer import write_dataset_if_absent
from foveal.errors import DataError

_NUM_LOOKED_AT = 64  # masks whose ids are listed if the classes are not named
_MAX_KINDS = 5  # in a note


def pack_masks(
    image_folder: Path,
    output_folder: Path,
    *,
    mask_folder: Path | None = None,
    classes: Sequence[str] | None = None,
    mask_suffix: str | None = None,
    map_ids: str | None = None,
    ignore_id: int | None = None,
    unpaired: str | None = None,
    **options: Any,
) -> bool:
    """Pack images and masks as shards in hashed order: a sample has the image and the member ``mask.png``.

    mask_folder None: masks are below ``image_folder`` too, in folders or files named so. Pairs and splits follow from
    the names of files and folders; lists of Pascal VOC are read. classes: names by id. map_ids: ids that are written in
    place of others, such as '255=1'. ignore_id: the id of pixels without a class, default 255. unpaired: 'skip' leaves
    out images without mask and masks without image. ``options`` (of PackOptions) change images and resize both. Return
    whether the shards were written now.
    Raises: DataError if files have no counterpart, a mask is no mask of its image or its ids are no classes, or as
    ``pack_folder``; ConfigError for invalid options.
    """
    pack_options = PackOptions.from_dict(options, "pack")
    id_map = parse_id_map(map_ids)
    check_unpaired_choice(unpaired)
    settings = {
        "mask_suffix": mask_suffix,
        "map_ids": map_ids,
        "ignore_id": None if ignore_id is None else str(ignore_id),
        "unpaired": unpaired,
        "classes": ",".join(classes) if classes else None,
    }

    def load_dataset() -> PackDataset:
        passed_over = PassedOver()
        pairs = find_pairs(image_folder, mask_folder, output_folder, mask_suffix, unpaired, passed_over)
        names = _check_classes(classes, pairs)
        ignored = ignore_id if ignore_id is not None else IGNORE_ID if len(names) <= IGNORE_ID else None
        member = MaskMember(MaskReader(MASK_FIELD, names, ignored), id_map)
        return _make_dataset(image_folder, mask_folder, pairs, member, pack_options, passed_over)

    source = PackSource("masks", image_folder, settings)
    return write_dataset_if_absent(output_folder, source, load_dataset, pack_options)


def _make_dataset(
    images: Path,
    masks: Path | None,
    pairs: Sequence[MaskPair],
    member: MaskMember,
    options: PackOptions,
    passed_over: PassedOver,
) -> PackDataset:
    notes = [_describe_pairs(pairs)]
    splits = [pair.split for pair in pairs]
    if None in splits and any(splits):
        inside, outside = (next(pair for pair in pairs if (pair.split is None) is none) for none in (False, True))
        raise DataError(
            f"{images}: {inside.image.path} is in the split '{inside.split}' by its folder, and {outside.image.path} is in "
            f"none: put all images into folders of splits, or pack the splits' folders only"
        )
    names = [split for split in splits if split is not None]
    if set(names) == {"train"}:
        notes.append("'train' is the only split: a part of it becomes 'val' (--val-fraction)")
        names = []
    labels = np.full(len(pairs), -1, dtype=np.int64)
    get_sample = partial(_make_sample, pairs, [pair.image.path for pair in pairs], labels, member)
    files = [
        (f"{kind} {file.path.relative_to(root).as_posix()}", file.path)
        for pair in pairs
        for kind, file, root in (("image", pair.image, images), ("mask", pair.mask, masks or images))
    ]
    digest = digest_files(files, options.workers, splits)
    if passed_over.counts:
        notes.append(f"passed over: {passed_over.describe()}")
    return PackDataset(
        name_dataset(images),
        member.reader.classes,
        build_splits(names or None, labels, options.val_fraction, get_sample),
        notes=tuple(notes),
        listing=digest,
        label_member=member,
    )


def _make_sample(
    pairs: Sequence[MaskPair], images: Sequence[Path], labels: np.ndarray, member: MaskMember, number: int
) -> PackSample:
    mask = pairs[number].mask.path

    def read_label(_: ImageSize) -> bytes:
        try:
            return member.read_mask(mask.read_bytes(), str(mask))
        except UndecodableError as error:
            raise UndecodableError(f"its mask {mask}: {error}") from None

    sample = make_file_sample(images, labels, number, f"{images[number]} with {mask}")
    return replace(sample, read_label=read_label)


def _check_classes(classes: Sequence[str] | None, pairs: Sequence[MaskPair]) -> tuple[str, ...]:
    """Return the names of classes. Raises: DataError that lists the masks' ids if there are none, or only one."""
    if classes is not None and len(classes) > 1:
        check_class_names(classes)
        return tuple(classes)
    looked_at = [pairs[number] for number in hashed_order(len(pairs))[:_NUM_LOOKED_AT]]
    ids: set[int] = set()
    member = MaskMember(MaskReader(MASK_FIELD, (), IGNORE_ID))
    for pair in looked_at:
        try:
            mask = member.read_mask(pair.mask.path.read_bytes(), str(pair.mask.path))
            ids.update(np.unique(decode_ids(mask)).tolist())
        except (OSError, UndecodableError) as error:
            raise DataError(f"{pair.mask.path}: this mask cannot be read: {error}") from None
    is_binary = len(ids) == 2 and min(ids) == 0
    example = "background,object" if is_binary else "NAME,NAME,..."
    remap = f" --map-ids {max(ids)}=1" if is_binary and max(ids) > 1 else ""
    given = f"--classes {classes[0]} names one class, and id 0 is one too" if classes else "the classes have no names"
    raise DataError(
        f"{given}: state --classes {example}{remap}, or --classes-file FILE with a name in a line, a name for every id from "
        f"0 on; {len(looked_at):,} of {len(pairs):,} masks hold the ids {list_ids(sorted(ids))}"
        + (f"; {IGNORE_ID} is read as pixels without a class" if IGNORE_ID in ids and not remap else "")
    )


def _describe_pairs(pairs: Sequence[MaskPair]) -> str:
    """Return how the masks of images are named."""
    kinds = Counter(f"{pair.kind}{pair.mask.path.suffix.lower()}" for pair in pairs)
    listed = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(_MAX_KINDS))
    more = f" and {len(kinds) - _MAX_KINDS:,} more kinds" if len(kinds) > _MAX_KINDS else ""
    return f"masks are named as their images: {listed}{more}"
