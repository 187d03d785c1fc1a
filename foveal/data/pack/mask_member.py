"""Masks as members of samples: PNG files of class ids, as `task=segmentation` reads them."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from foveal.data.image.decode import open_image, read_image_size, translate_errors
from foveal.data.image.decode_mask import decode_mask_crop
from foveal.data.image.masks import MaskReader
from foveal.data.pack.label_member import ImageSize, LabelMember
from foveal.errors import ConfigError, DataError

MASK_FIELD = "mask.png"
IGNORE_ID = 255  # default of data.ignore_id
_MAX_ID = (1 << 16) - 1  # of a PNG of one channel
# Phrases of the reader of masks that name what training sets, and what they are here.
_PHRASES = {
    "`foveal data index --classes`": "--classes",
    "data.ignore_id": "--ignore-id",
    ": write its shard again": ": a mask has the size of its image",
}
_BINARY = re.compile(r"write 1 in place of (\d+)|in masks of 0 and (255) a 1")


@dataclass(frozen=True)
class MaskMember(LabelMember):
    """Member ``mask.png``. id_map: ids that are written in place of others.

    rewritten: files that are stored otherwise than they are, by what they are.
    """

    reader: MaskReader
    id_map: Mapping[int, int] = field(default_factory=dict)
    rewritten: dict[str, set[str]] = field(default_factory=dict)

    def read_mask(self, data: bytes, name: str) -> bytes:
        """Return the member of a mask's file: a PNG as it is, unless its ids are mapped. Raises: UndecodableError."""
        grey = _read_equal_channels(data)
        if grey is not None:
            self.rewritten.setdefault("of colour channels that are equal", set()).add(name)
            data = _encode_ids(grey)
        with translate_errors():
            image_format = open_image(data).format
        if image_format != "PNG":
            self.rewritten.setdefault(f"{image_format} files", set()).add(name)
        if image_format == "PNG" and not self.id_map:
            return data
        return _encode_ids(self._map_ids(decode_ids(data), name))

    def _map_ids(self, ids: np.ndarray, name: str) -> np.ndarray:
        mapped = ids.copy()
        for before, after in self.id_map.items():
            mapped[ids == before] = after
        lowest, highest = mapped.min(), mapped.max()
        if lowest < 0 or highest > _MAX_ID:
            raise DataError(f"{name} has id {lowest if lowest < 0 else highest}, and ids are 0 to {_MAX_ID}")
        return mapped

    def resize(self, data: bytes, before: ImageSize, after: ImageSize) -> bytes:
        """Return a mask, resized by nearest neighbour as in training."""
        return _encode_ids(decode_mask_crop(data, (0, 0, *before), False, (after[1], after[0]))[1])

    def explain(self, sentence: str) -> str:
        for phrase, here in _PHRASES.items():
            sentence = sentence.replace(phrase, here)
        match = _BINARY.search(sentence)
        return f"{sentence}; --map-ids {match[1] or match[2]}=1 does so" if match else sentence

    def notes(self) -> list[str]:
        notes = [
            f"{len(names):,} masks are {kind}: stored as PNG of one channel"
            for kind, names in sorted(self.rewritten.items())
        ]
        if self.id_map:
            notes.append("ids are stored as others: " + ", ".join(f"{a} as {b}" for a, b in self.id_map.items()))
        if (ignored := self.reader.ignore_id) is not None:
            default = ", its default" if ignored == IGNORE_ID else ""
            notes.append(
                f"pixels of id {ignored} have no class: training ignores them with data.ignore_id={ignored}{default}"
            )
        return notes


def parse_id_map(text: str | None) -> dict[int, int]:
    """Return the mapping that ``--map-ids`` states, such as 255=1,2=0. Raises: ConfigError."""
    pairs: dict[int, int] = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d+)\s*=\s*(\d+)\s*", part)
        if match is None or max(int(match[1]), int(match[2])) > _MAX_ID:
            raise ConfigError(f"--map-ids {text}: '{part}' is not ID=ID, two numbers of 0 to {_MAX_ID}, such as 255=1")
        if int(match[1]) in pairs:
            raise ConfigError(f"--map-ids {text}: id {match[1]} is given twice")
        pairs[int(match[1])] = int(match[2])
    return pairs


def decode_ids(data: bytes) -> np.ndarray:
    """Return the ids of a mask as they are stored, upright: int32 [H, W]. Raises: UndecodableError."""
    width, height = read_image_size(data)
    return decode_mask_crop(data, (0, 0, width, height), False, (height, width))[1]


def list_ids(ids: Sequence[int]) -> str:
    """Return ascending ids in short, such as '0 to 10 and 255'."""
    ranges: list[list[int]] = []
    for each in ids:
        if ranges and each == ranges[-1][-1] + 1:
            ranges[-1][1:] = [each]
        else:
            ranges.append([each])
    parts = [" to ".join(map(str, span)) for span in ranges]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def _read_equal_channels(data: bytes) -> np.ndarray | None:
    """Return the grey of a mask that was stored in colour, uint8 [H, W]; None if it is none, or none without loss."""
    with translate_errors():
        image = open_image(data)
        tiles = getattr(image, "tile", None)
        rawmode = str(tiles[0][3]) if tiles else ""
        if image.format == "JPEG" or image.mode not in ("RGB", "RGBA", "LA") or "16" in rawmode:
            return None
        channels = np.asarray(image)
    grey = channels[..., 0]
    if image.mode != "RGB" and (channels[..., -1] != channels[0, 0, -1]).any():
        return None  # the transparency may be the mask
    return grey if image.mode == "LA" or (channels[..., :3] == grey[..., None]).all() else None


def _encode_ids(ids: np.ndarray) -> bytes:
    """Return ids of 0 to 65,535 as a grey PNG, of 8 bits if they fit."""
    stream = io.BytesIO()
    Image.fromarray(ids.astype(np.uint8 if ids.max() < 1 << 8 else np.uint16)).save(stream, "PNG")
    return stream.getvalue()
