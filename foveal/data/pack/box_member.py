"""Boxes as members of samples: JSON of COCO annotations, as `task=detection` reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal.data.image.boxes import BoxReader
from foveal.data.pack.label_member import ImageSize, LabelMember

BOX_FIELD = "json"
_DECIMALS = 3  # of a pixel; annotations have two


@dataclass(frozen=True)
class BoxMember(LabelMember):
    """Member ``json``: an object with the image's size and its annotations, whose categories are classes by number."""

    reader: BoxReader

    def resize(self, data: bytes, before: ImageSize, after: ImageSize) -> bytes:
        """Return annotations whose boxes, and whose stated size, are scaled like the image."""
        holder = json.loads(data)
        x_scale, y_scale = (new / old for new, old in zip(after, before, strict=True))
        for annotation in holder["annotations"]:
            left, top, width, height = annotation["bbox"]
            annotation["bbox"] = [left * x_scale, top * y_scale, width * x_scale, height * y_scale]
        return encode_boxes(holder["annotations"], after)


def encode_boxes(annotations: Sequence[Mapping[str, Any]], stated_size: ImageSize | None) -> bytes:
    """Return the member of an image's annotations (bbox, category_id, iscrowd); of an unknown size none is stated."""
    size = {} if stated_size is None else {"width": stated_size[0], "height": stated_size[1]}
    rounded = [{**each, "bbox": _round(each["bbox"])} for each in annotations]
    return json.dumps({**size, "annotations": rounded}).encode()


def _round(bbox: Any) -> Any:
    """Return a box with numbers of few digits; the reader refuses what is no box."""
    if not isinstance(bbox, list):
        return bbox
    return [round(number, _DECIMALS) if isinstance(number, float) else number for number in bbox]
