"""Names of shards: which split a file belongs to, and its number there."""

import itertools
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from foveal.data.format.shard_index import INDEX_SUFFIX
from foveal.data.storage.folder import Folder
from foveal.errors import DataError

# A hash of at least eight hexadecimal digits, as Hugging Face appends it; without a total, one of them is a letter.
_ANY_HASH = r"(?:[-_.][0-9a-f]{8,})?"
_HASH = r"(?:[-_.](?=[0-9a-f]*[a-f])[0-9a-f]{8,})?"
_SUFFIX = ".tar"  # in any case
_OF = re.compile(rf"(.*?)[-_.]?(\d+)[-_.]?of[-_.]?(\d+){_ANY_HASH}\.tar", re.IGNORECASE)  # train-00002-of-00004.tar
_NUMBERED = re.compile(rf"(.*?)[-_.]?(\d+){_HASH}\.tar", re.IGNORECASE)  # train-000012.tar: split 'train', number 12
_PLAIN = re.compile(r"(.*?)[-_.]?()\.tar", re.DOTALL | re.IGNORECASE)
_COMPRESSED = re.compile(r"(.*\.tar)\.\w+|(.*)\.tgz", re.IGNORECASE)
_PIECE = re.compile(  # as `split` and 7-Zip write
    r"(.*\.tar(?:\.\w+)?|.*\.tgz)\.(?:part[-_]?\d+|\d{2,}|(?:part[-_]?)?[a-z]{2})", re.IGNORECASE
)
_COMPRESSIONS = {"gz", "xz", "zst", "bz2", "lz", "br"}
# What file managers put before or behind the name of a copy: 'train (1)', 'train - Copy (2)', 'Copy of train'.
_COPY = re.compile(r"^copy[ _-]of[ _-]|[ _.-]*(?:\(\d+\)|copy(?:[ _-]?\d+)?)$", re.IGNORECASE)
_DEFAULT_SPLIT = "train"
_MAX_LISTED = 5  # names or numbers in a sentence


@dataclass(frozen=True)
class _ShardName:
    """A file name in parts. total: number of shards that the name states. scheme: how it is written, without its number."""

    file: str
    split: str
    number: int
    total: int | None
    scheme: str


def group_shards_by_split(source: Folder, on_warning: Callable[[str], None]) -> dict[str, list[str]]:
    """Return shard names by split, ordered by shard number; hidden files are passed over.

    ``SPLIT-NUMBER.tar`` and ``SPLIT-NUMBER-of-TOTAL.tar`` are shard NUMBER of SPLIT; without SPLIT it is train.
    on_warning: called for hidden shards, missing shards, and several ways of naming in one split.
    Raises: DataError if there are no shards, if a compressed shard has no unpacked copy in the folder, or if the names
    of a split state several totals or one number twice.
    """
    names = sorted(source.file_sizes())
    hidden = [name for name in names if name.startswith(".") and _is_shard(name)]
    shards = {name: None for name in names if _is_shard(name) and not name.startswith(".")}
    for name in names:
        if name not in shards and not name.startswith(".") and not name.endswith(INDEX_SUFFIX):
            _refuse_packed(source, name, shards)
    groups: dict[str, list[_ShardName]] = {}
    for shard in map(_parse_name, shards):
        groups.setdefault(shard.split, []).append(shard)
    if in_sub_folders := _describe_sub_folders(source):
        remedy = "move them into this folder as SPLIT-NUMBER.tar, or index their folder"
        if not groups:
            raise DataError(
                f"{source.display_path()}: no shards (*.tar) here, but in sub-folders {in_sub_folders}: {remedy}"
            )
        on_warning(f"shards in sub-folders are passed over: {in_sub_folders}; {remedy}")
    if not groups:
        raise DataError(f"{source.display_path()}: no shards (*.tar) here")
    if hidden:
        on_warning(f"hidden shards are passed over: {len(hidden):,}, the first is {hidden[0]}")
    for split, group in groups.items():
        group.sort(key=lambda shard: (shard.number, shard.file))
        _check_totals(source, split, group, on_warning)
    _check_split_names(groups, on_warning)
    _check_copies([shard for group in groups.values() for shard in group], on_warning)
    return {split: [shard.file for shard in group] for split, group in groups.items()}


def _is_shard(name: str) -> bool:
    return name.lower().endswith(_SUFFIX)


def _refuse_packed(source: Folder, name: str, shards: Container[str]) -> None:
    """Refuse a compressed shard, or a piece of a shard, that has no whole copy among ``shards``."""
    piece = _PIECE.fullmatch(name)
    if piece and name.rpartition(".")[2].lower() not in _COMPRESSIONS:
        whole = piece[1]
        plain = whole if _is_shard(whole) else f"{re.sub('[.]tar[.].*|[.]tgz', '', whole, flags=re.IGNORECASE)}.tar"
        if plain not in shards:
            raise DataError(
                f"{source.display_path(name)} is a piece of {whole}: join the pieces, as with `cat {whole}.* > {whole}`, "
                f"and index again"
            )
        return
    compressed = _COMPRESSED.fullmatch(name)
    plain = compressed and (compressed[1] or f"{compressed[2]}.tar")
    if plain and plain not in shards:
        raise DataError(
            f"{source.display_path(name)} is compressed, which has no random access: unpack it to {plain} and "
            f"index again"
        )


def _describe_sub_folders(source: Folder) -> str:
    """Return the sub-folders that hold shards, each with their number; '' if none does."""
    counts = {
        folder: count
        for folder, names in source.sub_folder_files().items()
        if (count := sum(_is_shard(name) and not name.startswith(".") for name in names))
    }
    listed = ", ".join(f"{folder} ({count:,})" for folder, count in sorted(counts.items())[:_MAX_LISTED])
    return listed + (", ..." if len(counts) > _MAX_LISTED else "")


def _parse_name(file: str) -> _ShardName:
    """Return the parts of a name that ends in .tar."""
    match = _OF.fullmatch(file) or _NUMBERED.fullmatch(file) or _PLAIN.fullmatch(file)
    assert match is not None, "every name that ends in .tar is at least a plain one"
    total = int(match[3]) if match.re is _OF else None
    padding = len(match[2]) if match[2].startswith("0") else ""
    scheme = f"{file[: match.start(2)]}{'' if total is None else 'of'}{padding}"
    return _ShardName(file, match[1] or _DEFAULT_SPLIT, int(match[2] or 0), total, scheme)


def _check_totals(source: Folder, split: str, group: list[_ShardName], on_warning: Callable[[str], None]) -> None:
    """Refuse the shards of several writings under one split; warn of missing shards and of several ways of naming."""
    stated = [shard for shard in group if shard.total is not None]
    if len(totals := sorted({shard.total or 0 for shard in stated})) > 1:
        examples = [next(shard.file for shard in stated if shard.total == total) for total in totals[:2]]
        raise DataError(
            f"{source.display_path()}: the shards of split '{split}' state different totals ({', '.join(examples)}): "
            f"leave one set of them in the folder"
        )
    for first, second in itertools.pairwise(stated):
        if first.number == second.number:
            raise DataError(
                f"{source.display_path()}: {first.file} and {second.file} are both shard {first.number} of split "
                f"'{split}': leave one set of them in the folder"
            )
    if stated:
        total, numbers = totals[0], {shard.number for shard in stated}
        start = 1 if total in numbers and 0 not in numbers else 0  # some writers count from 1
        for shard in stated:
            if not start <= shard.number < start + total:
                raise DataError(f"{source.display_path(shard.file)} is none of {total:,} shards: correct its name")
        if number := total - len(numbers):
            missing = [n for n in range(start, start + len(numbers) + _MAX_LISTED + 1) if n not in numbers]
            listed = ", ".join(map(str, missing[: min(number, _MAX_LISTED)])) + (
                ", ..." if number > _MAX_LISTED else ""
            )
            verb = "is" if number == 1 else "are"
            on_warning(f"{split}: {number:,} of {total:,} shards {verb} missing, by their names: number {listed}")
    schemes = {shard.scheme: shard.file for shard in group}
    if len(schemes) > 1 and not _is_one_counting(group):
        examples = ", ".join(sorted(schemes.values())[:_MAX_LISTED])
        on_warning(f"{split}: its shards are named in {len(schemes)} ways ({examples}) and are one split")
    for first, second in itertools.pairwise(group):
        if (first.number, first.scheme) == (second.number, second.scheme):
            on_warning(
                f"{split}: {first.file} and {second.file} have one number: leave one set of them in the folder if they "
                f"are two writings"
            )
            break


def _is_one_counting(group: list[_ShardName]) -> bool:
    """Whether names differ only because numbers are not padded, or grow beyond their padding."""
    bases = {re.sub(r"\d*$", "", shard.scheme) for shard in group}
    return len(bases) == 1 and len({shard.number for shard in group}) == len(group)


def _check_split_names(groups: Iterable[str], on_warning: Callable[[str], None]) -> None:
    """Warn if splits differ in a number only, as unknown ways of numbering look, or in case only, or if none is train."""
    splits = list(groups)
    by_pattern: dict[str, list[str]] = {}
    for split in splits:
        by_pattern.setdefault(re.sub(r"\d+", "#", split), []).append(split)
    for pattern, similar in by_pattern.items():
        if "#" in pattern and len(similar) > 1:
            names = ", ".join(f"'{name}'" for name in similar[:_MAX_LISTED]) + (
                ", ..." if len(similar) > _MAX_LISTED else ""
            )
            on_warning(
                f"{len(similar):,} splits differ in a number only ({names}): rename their shards to SPLIT-NUMBER.tar if "
                f"they are one split"
            )
    spellings: dict[str, str] = {}
    for split in splits:
        other = spellings.setdefault(split.casefold(), split)
        if other != split:
            on_warning(f"splits '{other}' and '{split}' differ in case only: rename their shards if they are one split")
    if _DEFAULT_SPLIT not in splits:
        names = ", ".join(f"'{name}'" for name in splits[:_MAX_LISTED]) + (", ..." if len(splits) > _MAX_LISTED else "")
        on_warning(f"no split is named '{_DEFAULT_SPLIT}': set data.train and data.val to splits of {names}")


def _check_copies(shards: Sequence[_ShardName], on_warning: Callable[[str], None]) -> None:
    """Warn of shards that look like copies of others and are splits of their own: 'train-000000 (1).tar'."""
    by_stem = {shard.file[: -len(_SUFFIX)].lower(): shard for shard in shards}
    copies: list[tuple[_ShardName, _ShardName]] = []
    for stem, shard in by_stem.items():
        # Numbers within a name may end the name of another shard, as in train-000000-old.tar.
        beginnings = [stem[: match.end()] for match in re.finditer(r"\d+(?=[\W_])", stem)]
        for name in (_COPY.sub("", _COPY.sub("", stem)), *beginnings):
            original = by_stem.get(name)
            if original is not None and original.split != shard.split:
                copies.append((shard, original))
                break
    if copies:
        shard, original = copies[0]
        others = f" ({len(copies) - 1:,} shards more are likewise)" if len(copies) > 1 else ""
        on_warning(
            f"{shard.file} is named like a copy of {original.file} and is split '{shard.split}'{others}: remove copies, or "
            f"rename the shards of one split to SPLIT-NUMBER.tar"
        )
