"""The teacher cache returns rows bit for bit as written, or none, even if writers were killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import teacher_cache_writer
import torch
from torch import Tensor

from distill.teacher_cache import TeacherCache, TensorSpec, check_cache_size
from foveal.errors import ConfigError

FACTS: dict[str, Any] = {"teacher": "ab", "seed": 3, "mean": [0.25]}
PARTS = (TensorSpec((3, 4), torch.float32), TensorSpec((), torch.int64), TensorSpec((5,), torch.bfloat16))
ROWS = 100
ROOT = Path(__file__).parents[3]


def teacher_cache(
    folder: Path, facts: dict[str, Any] = FACTS, rows: int = ROWS, parts: tuple[TensorSpec, ...] = PARTS
) -> TeacherCache:
    return TeacherCache(folder, facts, rows, parts)


def answers(indices: Tensor) -> tuple[Tensor, ...]:
    """Distinct rows, with NaN, negative zero and a denormal."""
    generator = torch.Generator().manual_seed(int(indices[0]))
    first = torch.randn(len(indices), 3, 4, generator=generator)
    first[:, 0, 0], first[:, 0, 1], first[:, 0, 2] = torch.nan, -0.0, 1e-42
    return first, indices * (1 << 40), torch.randn(len(indices), 5, generator=generator).bfloat16()


def same(tensors: tuple[Tensor, ...] | None, expected: tuple[Tensor, ...]) -> bool:
    assert tensors is not None
    return all(
        (tensor.dtype, tensor.shape) == (reference.dtype, reference.shape)
        and tensor.contiguous().view(-1).view(torch.uint8).equal(reference.contiguous().view(-1).view(torch.uint8))
        for tensor, reference in zip(tensors, expected, strict=True)
    )


def rows_file(folder: Path) -> Path:
    (file,) = folder.glob("*/rows")
    return file


def test_what_was_put_is_read_bit_for_bit_by_another(tmp_path: Path) -> None:
    indices = torch.tensor([7, 99, 0])
    first = teacher_cache(tmp_path)
    assert first.get(indices) is None
    first.put(indices, answers(indices))
    assert same(teacher_cache(tmp_path).get(indices), answers(indices))
    swapped = teacher_cache(tmp_path).get(indices.flip(0))
    assert same(swapped, tuple(part.flip(0) for part in answers(indices)))
    assert first.get(torch.tensor([7, 1])) is None, "all rows or None"
    assert rows_file(tmp_path).stat().st_blocks * 512 < ROWS * 1000, "unwritten rows take no disk space"


def test_a_teacher_is_asked_once(tmp_path: Path) -> None:
    indices, calls = torch.tensor([1, 2]), []

    def compute() -> tuple[Tensor, ...]:
        calls.append(1)
        return answers(indices)

    for _ in range(3):
        assert same(teacher_cache(tmp_path).get_or_compute(indices, compute), answers(indices))
    assert len(calls) == 1


def test_what_is_not_contiguous_is_kept_as_it_is(tmp_path: Path) -> None:
    cache = teacher_cache(tmp_path, parts=(TensorSpec((2, 3), torch.float32),))
    transposed = torch.arange(12.0).view(2, 3, 2).transpose(1, 2)
    cache.put(torch.tensor([4, 5]), (transposed,))
    assert same(cache.get(torch.tensor([4, 5])), (transposed.contiguous(),))


@pytest.mark.parametrize("byte", [0, 30, -1, -6])
def test_a_torn_row_is_not_there_until_it_is_put_again(byte: int, tmp_path: Path) -> None:
    cache, indices = teacher_cache(tmp_path), torch.tensor([3, 4])
    cache.put(indices, answers(indices))
    size = rows_file(tmp_path).stat().st_size // ROWS
    with rows_file(tmp_path).open("r+b") as stream:
        stream.seek(4 * size + byte % size)
        (value,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([value ^ 0x10]))
    assert cache.get(torch.tensor([4])) is None
    assert cache.get(torch.tensor([3])) is not None
    cache.put(indices, answers(indices))
    assert same(cache.get(indices), answers(indices))


def test_a_row_of_zeros_and_a_row_in_anothers_place_are_none(tmp_path: Path) -> None:
    cache = teacher_cache(tmp_path)
    cache.put(torch.tensor([3]), answers(torch.tensor([3])))
    size = rows_file(tmp_path).stat().st_size // ROWS
    content = bytearray(rows_file(tmp_path).read_bytes())
    content[8 * size : 9 * size] = content[3 * size : 4 * size]
    rows_file(tmp_path).write_bytes(content)
    assert cache.get(torch.tensor([2])) is None
    assert cache.get(torch.tensor([8])) is None
    os.truncate(rows_file(tmp_path), 4 * size - 1)
    assert cache.get(torch.tensor([3])) is None


@pytest.mark.parametrize("change", [{"teacher": "ac"}, {"seed": 4}, {"more": None}])
def test_other_facts_are_another_file(change: dict[str, Any], tmp_path: Path) -> None:
    indices = torch.tensor([1])
    teacher_cache(tmp_path).put(indices, answers(indices))
    assert teacher_cache(tmp_path, FACTS | change).get(indices) is None
    assert len(list(tmp_path.glob("*/rows"))) == 2
    assert {json.loads(file.read_text())["facts"].get("seed") for file in tmp_path.glob("*/facts.json")} <= {3, 4}


def test_other_parts_are_another_file_and_more_rows_are_not(tmp_path: Path) -> None:
    indices = torch.tensor([99])
    teacher_cache(tmp_path).put(indices, answers(indices))
    teacher_cache(tmp_path, parts=(*PARTS, TensorSpec((1,), torch.float32)))
    assert len(list(tmp_path.glob("*/rows"))) == 2
    assert same(teacher_cache(tmp_path, rows=10 * ROWS).get(indices), answers(indices))
    assert same(teacher_cache(tmp_path).get(indices), answers(indices))


@pytest.mark.parametrize("content", ["{", '{"facts": {}}'])
def test_facts_that_are_not_the_same_are_refused(content: str, tmp_path: Path) -> None:
    teacher_cache(tmp_path)
    (facts,) = tmp_path.glob("*/facts.json")
    facts.write_text(content)
    with pytest.raises(ConfigError, match=r"belongs to another teacher, other images or other settings: remove"):
        teacher_cache(tmp_path)


def test_a_place_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as the teacher cache"):
        teacher_cache(tmp_path / "file")


def test_too_many_gigabytes_are_refused_before_they_are_taken() -> None:
    parts = (TensorSpec((196, 768), torch.float32),)
    check_cache_size(1000, parts, 0.7, "cache.gigabytes")
    with pytest.raises(ConfigError) as caught:
        check_cache_size(1_281_167, parts, 100, "cache.gigabytes")
    assert str(caught.value) == (
        "cache.gigabytes=100, but the teacher's outputs for 1,281,167 views of images take up to 771.4 GB (0.6 MB each): "
        "raise the limit, or disable the cache"
    )


def wait_for_a_row(folder: Path) -> None:
    cache, deadline = teacher_cache_writer.opened(folder), time.monotonic() + 120
    while all(cache.get(torch.tensor([row])) is None for row in range(teacher_cache_writer.ROWS)):
        assert time.monotonic() < deadline, "no row is written"
    cache.close()


def test_rows_of_writers_that_were_killed_are_whole_or_not_there(tmp_path: Path) -> None:
    """Two processes write the same rows at once and are killed by SIGKILL while writing, ten times."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "teacher_cache_writer.py"), str(tmp_path)]
    rng, num_valid, all_rows = random.Random(5), 0, torch.arange(teacher_cache_writer.ROWS)
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(10):
            process.stdin.write("two\n")
            process.stdin.flush()
            children = [int(word) for word in process.stdout.readline().split()]
            if not num_valid:
                wait_for_a_row(tmp_path)
            time.sleep(rng.uniform(0.0, 0.05))
            for child in children:
                os.kill(child, signal.SIGKILL)
            cache = teacher_cache_writer.opened(tmp_path)
            for row in all_rows.split(1):
                tensors = cache.get(row)
                num_valid += tensors is not None
                assert tensors is None or same(tensors, teacher_cache_writer.answers(row))
            cache.close()
        process.stdin.close()
    assert num_valid, "the writers wrote rows"
    cache = teacher_cache_writer.opened(tmp_path)
    cache.put(all_rows, teacher_cache_writer.answers(all_rows))
    assert same(cache.get(all_rows), teacher_cache_writer.answers(all_rows))


FULL = """
import logging, resource, sys, torch
from pathlib import Path
from distill.teacher_cache import TeacherCache, TensorSpec
logging.basicConfig(format="%(message)s")
cache = TeacherCache(Path(sys.argv[1]), {}, 100, (TensorSpec((1000,), torch.float32),))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for row in range(100):
    cache.put(torch.tensor([row]), (torch.full((1, 1000), float(row)),))
print([row for row in range(100) if cache.get(torch.tensor([row])) is not None])
"""


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)
    assert ended.stdout == "[0, 1]\n"
    assert ended.stderr.count("teacher cache disabled") == 1
