"""Labels that are masks: the class of every pixel. K is the number of classes, H x W the size of the output."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from foveal.data.image.decode import DECODE_VERSION, UndecodableError
from foveal.data.image.decode_mask import decode_mask_crop
from foveal.data.image.label_drawing import draw_mask
from foveal.data.image.targets import (
    NO_CLASS,
    AppliedCrop,
    Finding,
    LabelReader,
    LabelSurvey,
    describe_missing_classes,
    explain_turned_size,
)
from foveal.errors import DataError

_MOSTLY_IGNORED = 0.5  # share of ignored pixels that is worth a note
_MAX_LISTED_CLASSES = 4  # in a summary
_MAX_COUNTED_ID = 1 << 16


@dataclass(frozen=True)
class MaskReader(LabelReader):
    """Reader of masks of class ids: int16 [H, W], the class of each pixel or ``NO_CLASS``.

    Without ``classes`` any id is one.
    """

    field: str
    classes: tuple[str, ...]
    ignore_id: int | None
    decode_version: int = DECODE_VERSION

    def read_label(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        mask = self.read_ids(data, crop, location)
        if self.ignore_id is not None:
            mask = np.where(mask == self.ignore_id, NO_CLASS, mask)
        return mask.astype(np.int16)

    def read_ids(self, data: bytes, crop: AppliedCrop, location: str) -> np.ndarray:
        """Return the ids as they are in the file, int32 [H, W].

        Raises: UndecodableError; DataError if the mask has not its image's size, or an id that is neither a class's nor
        ``ignore_id``.
        """
        try:
            size, mask = decode_mask_crop(data, crop.box, crop.flipped, crop.output_hw, self.decode_version)
        except UndecodableError as error:
            raise UndecodableError(f"its mask: {error}") from None
        if size != (crop.image_width, crop.image_height):
            raise DataError(
                f"{location} has a mask of {size[0]} x {size[1]} pixels and an image of {crop.image_width} x "
                f"{crop.image_height}{explain_turned_size(size, crop) or ': write its shard again'}"
            )
        if mask.min() < NO_CLASS:  # -1 in a signed TIFF is no class
            raise DataError(f"{location} has id {mask.min()} in its mask, and the ids of classes count from 0")
        wrong = (mask >= len(self.classes)) & (mask != (NO_CLASS if self.ignore_id is None else self.ignore_id))
        if self.classes and wrong.any():
            raise DataError(
                f"{location} has id {mask[wrong].max()} in its mask, and there are {len(self.classes)} classes"
                f"{self._explain_ids(np.unique(mask).tolist())}"
            )
        return mask

    def _explain_ids(self, ids: list[int]) -> str:
        """Return the end of a sentence: what the ids look like, and the remedy."""
        num = len(self.classes)
        labelled = [each for each in ids if each != self.ignore_id]
        highest = labelled[-1]
        if set(labelled) <= {0, 255} or (len(labelled) == 2 and labelled[0] == 0 and highest > num):
            return (
                f" with ids 0 to {num - 1}; a mask of {' and '.join(map(str, labelled))} alone looks binary: write 1 in "
                f"place of {labelled[-1]} if that is a class; data.ignore_id is the id of ignored pixels"
            )
        if num == highest and 0 in labelled:
            return f" with ids 0 to {num - 1}: state data.ignore_id={num} if its pixels have no class, or name one class more"
        if num == highest:
            return (
                ", whose ids count from 0: name id 0 too with `foveal data index --classes`, or write every id less 1; "
                "data.ignore_id is the id of ignored pixels"
            )
        if num < len(labelled):
            return (
                f" with ids 0 to {num - 1}; it has {len(labelled)} ids: a mask that was resized with interpolation has "
                f"ids of no class; data.ignore_id is the id of ignored pixels"
            )
        if len(labelled) > 2 and (step := math.gcd(*labelled)) > 1:
            return (
                f" with ids 0 to {num - 1}; its ids look multiplied by {step}, as for viewing: divide them; "
                f"data.ignore_id is the id of ignored pixels"
            )
        return f", with ids 0 to {num - 1}; data.ignore_id is the id of ignored pixels"

    def empty_label(self, output_hw: tuple[int, int]) -> np.ndarray:
        return np.full(output_hw, NO_CLASS, np.int16)

    def describe_label(self, label: np.ndarray) -> str:
        shares = np.bincount(label[label != NO_CLASS].ravel(), minlength=len(self.classes)) / max(1, label.size)
        largest = [number for number in np.argsort(-shares, kind="stable") if shares[number]]
        return ", ".join(f"{self.classes[number]} {100 * shares[number]:.0f}%" for number in largest) or "no class"

    def draw_label(self, image: Image.Image, label: np.ndarray) -> Image.Image:
        return draw_mask(image, label, len(self.classes))

    def make_survey(self) -> LabelSurvey:
        return MaskSurvey(self)


class MaskSurvey(LabelSurvey):
    """Counts of pixels by id over masks."""

    noun = "masks"

    def __init__(self, reader: MaskReader) -> None:
        super().__init__(reader)
        self._masks, self._classes, self._ignore_id = reader, reader.classes, reader.ignore_id
        self._pixels_per_id: Counter[int] = Counter()
        self._num_empty = 0  # masks without a labelled pixel

    def read_facts(self, data: bytes, crop: AppliedCrop, location: str) -> dict[int, int]:
        ids = self._masks.read_ids(data, crop, location)
        if ids.max() < _MAX_COUNTED_ID:  # several times as fast as a sort
            counts = np.bincount(ids.ravel() - NO_CLASS)
            values, counts = np.flatnonzero(counts) + NO_CLASS, counts[counts > 0]
        else:
            values, counts = np.unique(ids, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def count(self, facts: dict[int, int]) -> None:
        self._pixels_per_id.update(facts)
        self._num_empty += all(self._is_ignored(each) for each in facts)

    def needs_more(self) -> bool:
        return bool(self._classes) and len(self._labelled_ids()) < 2

    def summary(self) -> str:
        if not self.num_labels:
            return super().summary()
        total, labelled = sum(self._pixels_per_id.values()), self._labelled_ids()
        shares = [
            f"{self._class_name(each)} {self._pixels_per_id[each] / total:.0%}"
            for each in sorted(labelled, key=lambda each: (-self._pixels_per_id[each], each))
        ]
        hidden = len(shares) - _MAX_LISTED_CLASSES
        shares[_MAX_LISTED_CLASSES:] = [f"{hidden} more"] if hidden > 0 else []
        ignored = [f"no class {self._ignored_share():.0%}"] if len(labelled) < len(self._pixels_per_id) else []
        return f"{super().summary()}: {', '.join(shares + ignored)}"

    def content_findings(self, *, is_complete: bool) -> list[Finding]:
        scope, classes, met = f"{self.num_labels} {self.noun}", self._classes, self._labelled_ids()
        if not classes:
            return []
        if len(met) < 2:
            return [self._few_classes(met, scope, is_complete=is_complete)]
        notes = []
        if self._ignored_share() > _MOSTLY_IGNORED:
            notes.append(f"{self._ignored_share():.0%} of the pixels of {scope} have {self._ignored_phrase()}")
        if self._num_empty:
            notes.append(f"{self._num_empty} of {scope} have no pixel of a class, only {self._ignored_phrase()}")
        missing = [number for number in range(len(classes)) if number not in met]
        if self._ignore_id in missing:
            assert self._ignore_id is not None
            missing.remove(self._ignore_id)
            name = self._class_name(self._ignore_id)
            notes.append(f"pixels of class '{name}' are ignored: data.ignore_id={self._ignore_id} is its id")
        return [
            *(Finding("note", note) for note in notes),
            *describe_missing_classes(missing, classes, scope, of="mask ids"),
        ]

    def _few_classes(self, met: list[int], scope: str, *, is_complete: bool) -> Finding:
        """Return what it means that pixels of one class at most are in the masks."""
        if not met:
            severity = "untrainable" if is_complete else "note"
            return Finding(severity, f"no pixel of {scope} has a class, all have {self._ignored_phrase()}")
        name = self._class_name(met[0])
        if not self._ignored_share():
            severity = "untrainable" if is_complete else "note"
            return Finding(severity, f"every pixel of {scope} is of class '{name}' (id {met[0]})")
        sentence = (
            f"every labelled pixel of {scope} is of class '{name}' (id {met[0]}), and {self._ignored_share():.0%} of the "
            f"pixels have {self._ignored_phrase()}, which leaves them out: if that id is a class, write a number below "
            f"{len(self._classes)} in its place, in masks of 0 and 255 a 1; data.ignore_id is for pixels without a label"
        )
        return Finding("fault" if met == [0] else "untrainable", sentence)

    def _ignored_phrase(self) -> str:
        return f"the id of data.ignore_id={'null' if self._ignore_id is None else self._ignore_id}"

    def _is_ignored(self, id_in_mask: int) -> bool:
        return id_in_mask in (NO_CLASS, self._ignore_id)

    def _labelled_ids(self) -> list[int]:
        return sorted(each for each in self._pixels_per_id if not self._is_ignored(each))

    def _ignored_share(self) -> float:
        ignored = sum(pixels for each, pixels in self._pixels_per_id.items() if self._is_ignored(each))
        return ignored / max(1, sum(self._pixels_per_id.values()))

    def _class_name(self, number: int) -> str:
        return self._classes[number] if number < len(self._classes) else f"id {number}"
