"""Whether annotations in COCO's form are of the image beside them: its id and its size, where they are stated."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foveal.data.image.targets import AppliedCrop, explain_turned_size, list_names
from foveal.errors import DataError

_SIZE_KEYS = (("width", "height"), ("imageWidth", "imageHeight"), ("image_width", "image_height"))


def check_annotated_image(
    annotations: Sequence[Mapping[str, Any]], holder: Mapping[str, Any], crop: AppliedCrop, location: str
) -> None:
    """Raise DataError if annotations are of several images, of another one than is stated, or of one of another size.

    ``holder`` is the object with the list of annotations, which may also have ``images``, ``image``, or a size itself.
    """
    ids = {str(each["image_id"]) for each in annotations if each.get("image_id") is not None}
    if len(ids) > 1:
        raise DataError(
            f"{location}: its annotations are of {len(ids)} images, with image_id {list_names(sorted(ids))}: a sample has "
            f"the annotations of its own image"
        )
    entries = list(_iter_image_entries(holder))
    stated_ids = {str(entry["id"]) for entry in entries if entry.get("id") is not None}
    if ids and stated_ids and not ids <= stated_ids:
        raise DataError(
            f"{location}: its annotations have image_id {list_names(ids)}, and its image has id "
            f"{list_names(sorted(stated_ids))}: a sample has the annotations of its own image"
        )
    own = [entry for entry in entries if not ids or entry.get("id") is None or str(entry["id"]) in ids]
    if len(own) > 1:
        return  # images without annotations, none of which is known to be this one
    for entry in (holder, *own):
        size = _read_size(entry)
        if size is not None and size != (crop.image_width, crop.image_height):
            remedy = explain_turned_size(size, crop) or ": scale its boxes to the image, and state the image's size"
            raise DataError(
                f"{location}: its annotations are of an image of {size[0]:g} x {size[1]:g} pixels, and its image has "
                f"{crop.image_width} x {crop.image_height}{remedy}"
            )


def _iter_image_entries(holder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the descriptions of images in an object with annotations."""
    images = holder.get("images")
    for entry in (holder.get("image"), *(images if isinstance(images, list) else ())):
        if isinstance(entry, dict):
            yield entry


def _read_size(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the (width, height) that an object states; None if it states none."""
    inner = entry.get("size")
    for place in (entry, inner if isinstance(inner, dict) else {}):
        for keys in _SIZE_KEYS:
            width, height = (place.get(key) for key in keys)
            if isinstance(width, int | float) and isinstance(height, int | float):
                return width, height
    return None
