"""What indexing found, shard by shard: the splits of the manifest, and sentences about what a user should know."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from foveal.data.format.image_fields import is_image_field, says_label
from foveal.data.format.manifest import Shard, Split
from foveal.data.format.shard_index import LeftOut, ShardIndex
from foveal.data.indexing.naming import may_hold_class
from foveal.errors import DataError

LEFT_OUT_SUFFIX = ": it is left out"
_MAX_LISTED = 5  # shards in a sentence


@dataclass(frozen=True)
class ShardSummary:
    """Part of an index that the manifest needs; 200,000 complete indices would not fit into memory.

    shard: None if the shard has no samples. image_fields: those that may be the image, by
    preference. num_choices: number of samples that have several images.
    """

    file: str
    shard: Shard | None
    fields: tuple[str, ...]
    image_fields: tuple[str, ...]
    max_label: int
    num_unlabelled: int
    num_choices: int
    note: str
    left_out: LeftOut


def summarize_index(index: ShardIndex, display_path: str) -> ShardSummary:
    """Return the summary of an index. display_path: of its shard, for messages."""
    if not len(index):
        note = f"{index.note or f'{display_path} holds no samples'}{LEFT_OUT_SUFFIX}"
        return ShardSummary(index.shard, None, (), (), -1, 0, 0, note, index.left_out)
    return ShardSummary(
        file=index.shard,
        shard=make_manifest_shard(index),
        fields=index.fields,
        image_fields=index.candidate_image_fields(),
        max_label=int(index.labels.max()),
        num_unlabelled=int((index.labels < 0).sum()),
        num_choices=int((index.count_images() > 1).sum()),
        note=index.note,
        left_out=index.left_out,
    )


def make_manifest_shard(index: ShardIndex, sha256: str | None = None) -> Shard:
    """Return the manifest's entry of a shard."""
    return Shard(
        file=index.shard, samples=len(index), bytes=index.bytes, sha256=sha256, index=index.compute_samples_digest()
    )


def collect_fields(indices: Iterable[ShardIndex | ShardSummary]) -> tuple[str, ...]:
    """Return the fields of all shards, in order of first appearance."""
    return tuple(dict.fromkeys(name for index in indices for name in index.fields))


def summarize_splits(groups: dict[str, list[ShardSummary]], on_warning: Callable[[str], None]) -> dict[str, Split]:
    """Return the splits that have samples; warn of notes, of what was left out, and of samples without a class."""
    splits = {}
    for split, group in groups.items():
        for summary in group:
            if summary.note:
                on_warning(summary.note)
        shards = tuple(summary.shard for summary in group if summary.shard)
        samples = sum(shard.samples for shard in shards)
        _warn_of_left_out(split, group, on_warning)
        if num_unlabelled := sum(summary.num_unlabelled for summary in group):
            on_warning(f"{split}: {_describe_unlabelled(num_unlabelled, samples, collect_fields(group))}")
        if shards:
            splits[split] = Split(samples=samples, shards=shards)
    return splits


def _describe_unlabelled(num_unlabelled: int, num_samples: int, fields: Sequence[str]) -> str:
    """Return that samples have no class in the index, which labels in other members do not need."""
    sentence = f"{num_unlabelled:,} of {num_samples:,} samples have no class"
    if unread := [field for field in fields if may_hold_class(field)]:
        remedy = "a class is read from KEY.cls, or from KEY.json with --label-key ENTRY: write the shards again"
        return f"{sentence}; .{', .'.join(unread[:_MAX_LISTED])} may hold it, and {remedy}"
    if num_unlabelled == num_samples and (members := [field for field in fields if _may_hold_labels(field)]):
        return f"no sample has a class of its whole image; .{', .'.join(members)} may hold labels"
    if num_unlabelled == num_samples:
        return "no sample has a label, which pretraining and distillation of features do not need"
    return sentence


def _may_hold_labels(field: str) -> bool:
    name, _, extension = field.lower().rpartition(".")
    return extension == "json" or (is_image_field(field) and says_label(name))


def _warn_of_left_out(split: str, group: Sequence[ShardSummary], on_warning: Callable[[str], None]) -> None:
    affected = [summary for summary in group if summary.shard and summary.left_out.samples]
    if affected:
        number = sum(summary.left_out.samples for summary in affected)
        listed = ", ".join(
            f"{summary.file} {summary.left_out.samples:,} (first '{summary.left_out.first_key}')"
            for summary in affected[:_MAX_LISTED]
        )
        rest = f" and {len(affected) - _MAX_LISTED:,} shards more" if len(affected) > _MAX_LISTED else ""
        on_warning(f"{split}: samples without an image are left out, {number:,} in all: {listed}{rest}")
    if num_twins := sum(summary.left_out.twins for summary in group):
        first = next(summary for summary in group if summary.left_out.twins)
        on_warning(
            f"{split}: {num_twins:,} samples are named as labels of others are, the first is '{first.left_out.first_twin}' of "
            f"{first.file}: if they are labels of images, write the shards again as KEY.jpg + KEY.mask.png"
        )
    if num_files := sum(summary.left_out.files for summary in group if summary.shard):
        on_warning(f"{split}: {num_files:,} files in shards are passed over: they are hidden, or have no extension")


def check_images(
    location: str, summaries: Iterable[ShardSummary], image_field: str | None, on_warning: Callable[[str], None]
) -> None:
    """Warn which member is the image where that is not plain.

    Raises: DataError if shards have their image in different members of the form NAME.jpg.
    """
    examples: dict[str, ShardSummary] = {}  # a shard for each name before the extension
    num_choices, choices = 0, dict[tuple[str, ...], None]()
    for summary in summaries:
        if summary.image_fields:
            examples.setdefault(summary.image_fields[0].rpartition(".")[0], summary)
        if summary.num_choices:
            num_choices += summary.num_choices
            choices[summary.image_fields] = None
    if image_field is None and len(examples) > 1:
        first, second = list(examples.values())[:2]
        first_field, second_field = first.image_fields[0], second.image_fields[0]
        raise DataError(
            f"{location}: the image is member .{first_field} in {first.file} and .{second_field} in {second.file}: "
            f"index with --image-field {first_field} or {second_field}, which leaves samples without it out"
        )
    if num_choices:
        orders = "; ".join(" before ".join(f".{name}" for name in fields) for fields in list(choices)[:_MAX_LISTED])
        on_warning(
            f"{num_choices:,} samples have several images, of which one is read ({orders}): --image-field NAME reads "
            f"another; data.label_field is never the image"
        )
    elif image_field is None and examples and "" not in examples:
        on_warning("".join(f"the image is the member .{name}.*" for name in examples))


def with_checksums(splits: dict[str, Split], find_checksum: Callable[[Shard], str | None]) -> dict[str, Split]:
    """Return the splits with the sha256 of each shard that ``find_checksum`` returns."""
    return {
        name: split.model_copy(
            update={"shards": tuple(replace(shard, sha256=find_checksum(shard)) for shard in split.shards)}
        )
        for name, split in splits.items()
    }
