"""Which members of a sample can be its image.

A field is the part of a member's name behind the key: ``jpg``, or ``input.jpg``, which has a name before its extension.
"""

import re
from collections.abc import Iterable

# Fields that hold the image, by the preference of 0.1.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif")

# Orders of preference, by version. Of two images without a name, the one in a format of masks is rather a mask.
IMAGE_ORDER = 2
_ORDERS = {1: IMAGE_EXTENSIONS, 2: ("jpg", "jpeg", "webp", "tif", "tiff", "bmp", "ppm", "png", "pgm", "gif")}

_OTHER_SPELLING = {"jpg": "jpeg", "jpeg": "jpg", "tif": "tiff", "tiff": "tif"}
# Words in the name of a field, file or folder that is a label of an image, such as mask.png or seg_map.png.
_LABEL_WORDS = (
    r"(?:binary)?masks?|seg(?:m|s|mentations?)?(?:class|object|maps?|masks?)?|sem(?:antic|seg)|instances?(?:ids?)?|panoptic"
    r"|labels?|label(?:train)?ids?|label(?:maps?|img)|lbls?|depths?|disparity|normals?|edges?|flow"
    r"|gts?|gt(?:fine|coarse)|ground[ ._-]?truths?|targets?|annotations?|annots?|annos?|anns?|trimaps?|alpha|mattes?|heatmaps?"
    r"|saliency|parsing"
)
# Words that name the image beside its label, as in image_0.png + mask_0.png or 0_rgb.png + 0_depth.png.
_IMAGE_WORDS = r"(?:jpeg)?images?|imgs?|im|rgb|colou?r|photos?|inputs?|orig(?:inal)?|raw|frames?|sat|leftimg8bit"
_SEPARATOR = "[._ -]"
_SAYS_LABEL = re.compile(rf"(^|{_SEPARATOR})\d*({_LABEL_WORDS})\d*($|{_SEPARATOR})", re.IGNORECASE)
_TOKEN = re.compile(rf"(\d*)(?:(?P<label>{_LABEL_WORDS})|{_IMAGE_WORDS})(\d*)", re.IGNORECASE)


def choose_image_fields(
    fields: Iterable[str], image_field: str | None = None, label_field: str | None = None, *, order: int = IMAGE_ORDER
) -> tuple[str, ...]:
    """Return those of ``fields`` that hold the image, by preference; () if none does or several may.

    image_field: the field, or its name before the extension, if it is known. label_field: the field of the label, which
    is never the image. order: version of the preference (1: that of 0.1). Otherwise the image is a field that is an
    image extension; without one, it is the field NAME.jpg (or .png, ...) if all such fields have one NAME and NAME does
    not say that it is a label.
    """
    candidates = {field for field in fields if field != label_field}
    if image_field is not None:
        name, dot, extension = image_field.rpartition(".")
        names = (
            image_field,
            f"{name}{dot}{_OTHER_SPELLING.get(extension, extension)}",
            *_with_name(image_field, order),
        )
    elif candidates.isdisjoint(IMAGE_EXTENSIONS):
        candidate_names = {split_image_field(field)[0] for field in named_image_fields(candidates)}
        if len(candidate_names) != 1 or (only_name := candidate_names.pop()).isdecimal():
            return ()
        names = _with_name(only_name, order)
    else:
        names = _ORDERS[order]
    return tuple(dict.fromkeys(name for name in names if name in candidates))


def named_image_fields(fields: Iterable[str]) -> list[str]:
    """Return the fields of the form NAME.jpg (or .png, ...) whose name does not say that they are labels."""
    return [
        field for field in fields if is_image_field(field) and "." in field and not says_label(field.rpartition(".")[0])
    ]


def says_label(name: str) -> bool:
    """Whether the name of a field or folder says that it holds labels of images, such as mask or seg_map."""
    return _SAYS_LABEL.search(name) is not None


def strip_kind_words(name: str) -> set[str]:
    """Return a file name without the words that say image or label: '0' for image_0, 0_rgb and 0_mask.

    The number of a label, as in 0_mask_1, may belong to the name or count the labels: both readings are returned.
    """
    with_number, without_number = list[str](), list[str]()
    is_behind_label = False
    for token in re.split(rf"{_SEPARATOR}+", name):
        match = _TOKEN.fullmatch(token)
        parts = [token] if match is None else [match[1], match[3]]
        with_number += filter(None, parts)
        if not is_behind_label or not token.isdecimal():
            without_number += filter(None, parts if match is None or not match["label"] else [match[1]])
        is_behind_label = match is not None and match["label"] is not None
    return {"_".join(with_number), "_".join(without_number)}


def is_image_field(field: str) -> bool:
    """Whether a field ends in an image extension; it may be a mask."""
    return field.rpartition(".")[2] in IMAGE_EXTENSIONS


def split_image_field(field: str) -> tuple[str, str]:
    """Return the name ('' for none) and the image extension ('' for none) of a field."""
    name, _, extension = field.rpartition(".")
    return (name, extension) if extension in IMAGE_EXTENSIONS else (field, "")


def _with_name(name: str, order: int) -> tuple[str, ...]:
    return tuple(f"{name}.{extension}" for extension in _ORDERS[order])
