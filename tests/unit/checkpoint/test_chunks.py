"""Chunks: any split over ranks reads any other split; a mismatch raises one sentence and changes nothing."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from foveal.checkpoint.chunk_index import ChunkIndex, load_chunks
from foveal.checkpoint.chunks import DTYPE_NAMES, TensorChunk, replicated_chunk, write_and_hash_chunks
from foveal.errors import CheckpointError

PARTS = {"weight": 0, "exp_avg": 1000, "exp_avg_sq": 2000}


def trained(name: str, shape: tuple[int, ...]) -> TensorChunk:
    """A trained tensor with distinct elements in every part."""
    size = torch.Size(shape).numel()
    tensors = {part: torch.arange(size, dtype=torch.float32) + first for part, first in PARTS.items()}
    return TensorChunk(name, shape, 0, tensors, (0, size))


def frozen(name: str, value: Tensor) -> TensorChunk:
    return replicated_chunk(name, {"weight": value}, 0, 1)


def cut(chunk: TensorChunk, start: int, stop: int) -> TensorChunk:
    """A range of a chunk, with copied tensors."""
    return replace(
        chunk,
        flat_start=start,
        flat_views_by_part={part: value[start:stop].clone() for part, value in chunk.flat_views_by_part.items()},
        relative_write_range=(0, stop - start),
    )


def empty(chunk: TensorChunk) -> TensorChunk:
    return replace(
        chunk, flat_views_by_part={part: torch.full_like(value, -1) for part, value in chunk.flat_views_by_part.items()}
    )


def read(folder: Path, chunks: Sequence[TensorChunk]) -> list[TensorChunk]:
    """The same ranges, filled from the folder."""
    blank = [empty(chunk) for chunk in chunks]
    load_chunks(folder, blank)
    return blank


def check(actual: Sequence[TensorChunk], expected: Sequence[TensorChunk]) -> None:
    for chunk, reference in zip(actual, expected, strict=True):
        assert chunk.flat_views_by_part.keys() == reference.flat_views_by_part.keys()
        assert all(
            chunk.flat_views_by_part[part].equal(reference.flat_views_by_part[part])
            for part in chunk.flat_views_by_part
        ), chunk.name


def test_weights_without_moments(tmp_path: Path) -> None:
    """Whatever moments the folder has; the ones in place stay as they are."""
    write_and_hash_chunks(tmp_path, 0, [trained("layer", (4, 3)), frozen("scale", torch.ones(2))])
    parts = {"weight": torch.zeros(12), "momentum_buffer": torch.full((12,), 7.0)}
    chunks = [replace(trained("layer", (4, 3)), flat_views_by_part=parts), frozen("scale", torch.zeros(2))]
    with pytest.raises(CheckpointError):
        load_chunks(tmp_path, chunks)
    load_chunks(tmp_path, chunks, weights_only=True)
    assert parts["weight"].equal(torch.arange(12.0))
    assert parts["momentum_buffer"].equal(torch.full((12,), 7.0))
    assert ChunkIndex.read(tmp_path).parts_by_name() == {
        "layer": {"weight", "exp_avg", "exp_avg_sq"},
        "scale": {"weight"},
    }


SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
MODELS = st.lists(st.tuples(SHAPES, st.booleans()), min_size=1, max_size=4)
CUTS = st.lists(st.floats(0, 1), max_size=6)


def build_model(specs: Sequence[tuple[tuple[int, ...], bool]]) -> list[TensorChunk]:
    chunks = []
    for number, (shape, is_trained) in enumerate(specs):
        chunk = trained(f"block.{number} x", shape)
        chunks.append(
            chunk if is_trained else frozen(chunk.name, chunk.flat_views_by_part["weight"].view(shape).to(torch.int64))
        )
    return chunks


def split(model: Sequence[TensorChunk], cuts: Sequence[float], skew: int) -> list[list[TensorChunk]]:
    """The chunks of each rank: the ranges between the cuts, with ``skew`` ranks between the starts of two tensors."""
    ranks: list[list[TensorChunk]] = [[] for _ in range(len(cuts) + 1)]
    for number, chunk in enumerate(model):
        size = chunk.relative_write_range[1]
        ends = [0, *sorted(int(fraction * size) for fraction in cuts), size]
        for rank in range(len(ranks)):
            ranks[(rank + number * skew) % len(ranks)].append(cut(chunk, ends[rank], ends[rank + 1]))
    return ranks


@given(specs=MODELS, write_cuts=CUTS, read_cuts=CUTS, skews=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_any_split_is_read_by_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    specs: list[tuple[tuple[int, ...], bool]],
    write_cuts: list[float],
    read_cuts: list[float],
    skews: tuple[int, int],
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    model = build_model(specs)
    for rank, chunks in enumerate(split(model, write_cuts, skews[0])):
        write_and_hash_chunks(folder, rank, chunks)
    for chunks in split(model, read_cuts, skews[1]):
        check(read(folder, chunks), chunks)
    check(read(folder, model), model)  # also by a rank with all elements


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_that_hold_all_write_a_share_each(ranks: int, tmp_path: Path) -> None:
    values = {part: torch.randn(2, 3) for part in PARTS}
    sizes = []
    for rank in range(ranks):
        sizes.append(len(range(*replicated_chunk("x", values, rank, ranks).relative_write_range)))
        write_and_hash_chunks(tmp_path, rank, [replicated_chunk("x", values, rank, ranks)])
    assert sum(sizes) == 6 and max(sizes) - min(sizes) <= 1
    check(read(tmp_path, [replicated_chunk("x", values, 0, 1)]), [replicated_chunk("x", values, 0, 1)])


@pytest.mark.parametrize("ranks", [17, 64, 1000])
def test_of_many_ranks_that_hold_all_few_write_and_far_apart(ranks: int) -> None:
    """Every rank reads the files of all writers at a resume."""
    values = {"weight": torch.empty(1000)}
    ranges = [replicated_chunk("x", values, rank, ranks).relative_write_range for rank in range(ranks)]
    writers = [rank for rank, (first, last) in enumerate(ranges) if first < last]
    assert [element for first, last in ranges for element in range(first, last)] == list(range(1000))
    assert len(writers) == 16
    assert min(later - earlier for earlier, later in pairwise(writers)) >= ranks // 16


def test_views_are_live(tmp_path: Path) -> None:
    """Filling a chunk fills the parameter that it is a view of."""
    layer = torch.nn.Linear(3, 2)
    write_and_hash_chunks(tmp_path, 0, [frozen("weight", torch.full((2, 3), 7.0))])
    load_chunks(tmp_path, [replicated_chunk("weight", {"weight": layer.weight}, 0, 1)])
    assert layer.weight.equal(torch.full((2, 3), 7.0))


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_type_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    odd = frozen("odd", torch.zeros(3, dtype=torch.uint8))  # must not misalign later tensors
    chunks = [odd, frozen("x", value), frozen("scalar", torch.tensor(3.5))]
    write_and_hash_chunks(tmp_path, 0, chunks)
    loaded = read(tmp_path, chunks)
    assert loaded[1].flat_views_by_part["weight"].equal(value.view(-1))
    assert loaded[2].flat_views_by_part["weight"].tolist() == [3.5]


def test_the_file_is_an_ordinary_safetensors_file_of_the_digest_that_is_returned(tmp_path: Path) -> None:
    digest = write_and_hash_chunks(tmp_path, 3, [cut(trained("a.b", (4, 2)), 2, 5)])
    file = tmp_path / "pieces-00003.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    with safe_open(file, "pt") as handle:
        assert set(handle.keys()) == {f"{part} 2 a.b" for part in PARTS}
        assert handle.get_tensor("exp_avg 2 a.b").tolist() == [1002.0, 1003.0, 1004.0]


MODEL = [trained("a", (4, 2)), frozen("b", torch.arange(3.0))]
WRONG = {
    "another model has more": ([*MODEL, frozen("c", torch.ones(2))], r"lacks c, which the model has; continue with"),
    "another model has less": (MODEL[:1], r"has b, which the model lacks; continue with"),
    "another shape of the same size": (
        [trained("a", (2, 4)), MODEL[1]],
        r"has a in shape \[4, 2\], the model in \[2, 4\]",
    ),
    "another size": ([MODEL[0], frozen("b", torch.arange(4.0))], r"has b in shape \[3\], the model in \[4\]"),
    "frozen since": ([frozen("a", torch.zeros(4, 2)), MODEL[1]], r"a was trained when .* was saved and is frozen now"),
    "trained since": ([MODEL[0], trained("b", (3,))], r"b was frozen when .* was saved and is trained now"),
    "another type": ([MODEL[0], frozen("b", torch.arange(3))], r"has b \(weight\) as F32, the model as I64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_model_is_refused_in_one_sentence_and_nothing_is_filled(case: str, tmp_path: Path) -> None:
    for rank, (start, stop) in enumerate([(0, 3), (3, 8)]):
        write_and_hash_chunks(tmp_path, rank, [cut(MODEL[0], start, stop), *([MODEL[1]] if rank else [])])
    chunks, sentence = WRONG[case]
    blank = [empty(chunk) for chunk in chunks]
    with pytest.raises(CheckpointError, match=sentence) as error:
        load_chunks(tmp_path, blank)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert all((value == -1).all() for chunk in blank for value in chunk.flat_views_by_part.values())


TORN = {
    "the beginning": ([(2, 8)], r"lacks elements 0 to 1 of a \(weight, 8 elements\)"),
    "the middle": ([(0, 3), (5, 8)], r"lacks elements 3 to 4 of a"),
    "the end": ([(0, 3), (3, 6)], r"lacks elements 6 to 7 of a"),
    "an overlap": ([(0, 5), (3, 8)], r"has element 3 twice of a"),
    "too much": ([(0, 8), (7, 8)], r"has element 7 twice of a"),
}


@pytest.mark.parametrize("case", TORN)
def test_a_checkpoint_with_a_hole_or_a_double_is_refused(case: str, tmp_path: Path) -> None:
    ranges, sentence = TORN[case]
    for rank, (start, stop) in enumerate(ranges):
        write_and_hash_chunks(tmp_path, rank, [cut(MODEL[0], start, stop)])
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path, [cut(MODEL[0], 4, 5)])  # although the fault is outside of the requested range


def test_a_rank_that_holds_nothing_of_a_tensor_hears_of_it_too(tmp_path: Path) -> None:
    write_and_hash_chunks(tmp_path, 0, MODEL)
    nothing = [cut(trained("a", (2, 4)), 0, 0), MODEL[1]]
    with pytest.raises(CheckpointError, match=r"has a in shape"):
        load_chunks(tmp_path, nothing)


@pytest.mark.parametrize("keep", [0, 4, 40])
def test_a_torn_file_is_named(keep: int, tmp_path: Path) -> None:
    write_and_hash_chunks(tmp_path, 0, MODEL)
    file = tmp_path / "pieces-00000.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(str(file)) + r" cannot be read"):
        read(tmp_path, MODEL)


def test_only_the_ranges_that_are_needed_are_read(tmp_path: Path) -> None:
    """Reading three elements of a 64 MiB file takes less than 16 MiB of memory."""
    size = 1 << 24
    value = torch.arange(size, dtype=torch.float32)
    write_and_hash_chunks(tmp_path, 0, [frozen("big", value)])
    chunk = TensorChunk("big", (size,), size // 2, {"weight": torch.zeros(3)}, (0, 3))
    before = psutil.Process().memory_info().rss
    load_chunks(tmp_path, [chunk])
    assert psutil.Process().memory_info().rss - before < size
    assert chunk.flat_views_by_part["weight"].equal(value[size // 2 : size // 2 + 3])
