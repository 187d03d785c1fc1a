"""Names of splits: which of foveal's splits a folder or a cell of a split column means."""

import re
import unicodedata
from collections.abc import Iterable

from foveal.errors import DataError

SPLIT_ORDER = ("train", "val", "test")

_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# Words that are splits more seldom, or in longer names: enough for a question, not for an answer.
_MAYBE_WORDS = {
    "trn": "train",
    "eval": "val",
    "evaluate": "val",
    "evaluation": "val",
    "holdout": "test",
    "infer": "predict",
    "inference": "predict",
    "pred": "predict",
    "predict": "predict",
    "prediction": "predict",
    "predictions": "predict",
    "tst": "test",
}
# A year, as in COCO's `train2017`, and a second word, as in `training_set`, do not change the meaning.
_SPLIT_NAME = re.compile(rf"({'|'.join(_WORDS)})(?:[ _-]?(?:set|split|data|images))?(?:[ _-]?(?:19|20)\d\d)?")
_MAX_LENGTH = 40


def fold_case(name: str) -> str:
    """Return the form in which names are compared: neither case nor Unicode form counts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def recognize_split(name: str) -> str | None:
    """Return the split that a usual name means, in any case: train, val or test; None for another name."""
    match = _SPLIT_NAME.fullmatch(fold_case(name.strip()))
    return _WORDS[match[1]] if match else None


def guess_split(name: str) -> str | None:
    """Return the split that a name may mean because a word of it names one: `seg_train`, `test1`, `trainA`, `eval`.

    Images for predictions, which have no labels, are 'predict'.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", unicodedata.normalize("NFC", name))
    guesses = (recognize_split(word) or _MAYBE_WORDS.get(fold_case(word)) for word in words)
    return recognize_split(name) or next(filter(None, guesses), None)


def normalize_split_names(names: Iterable[str]) -> dict[str, str]:
    """Return foveal's name of every split name of a source: 'val' for 'Validation'; others keep theirs.

    Raises: DataError if a name cannot be part of a file name, or two names mean one split.
    """
    normalized: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in sorted(set(names)):
        split = check_split_name(recognize_split(name) or name)
        other = taken.setdefault(fold_case(split), name)
        if other != name:
            raise DataError(
                f"splits '{other}' and '{name}' of the source have one meaning, '{split}': rename one of them"
            )
        normalized[name] = split
    return normalized


def check_split_name(name: str) -> str:
    """Return a split's name. Raises: DataError if it cannot be part of a file name."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{_MAX_LENGTH - 1}}}", name):
        raise DataError(
            f"'{name[:_MAX_LENGTH]}' cannot name a split: file names of shards contain it, use letters and digits"
        )
    return name


def split_rank(name: str) -> tuple[int, str]:
    """Return the sort key of a split: train, val, test, then the others by name."""
    return (SPLIT_ORDER.index(name) if name in SPLIT_ORDER else len(SPLIT_ORDER), name)
