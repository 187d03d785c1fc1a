"""A teacher's answers on disk: bit for bit what was put, or nothing, whoever was killed while writing."""

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


def lessons(
    folder: Path, facts: dict[str, Any] = FACTS, rows: int = ROWS, parts: tuple[TensorSpec, ...] = PARTS
) -> TeacherCache:
    return TeacherCache(folder, facts, rows, parts)


def answers(indices: Tensor) -> tuple[Tensor, ...]:
    """Something else for every row, NaN and negative zero among it."""
    generator = torch.Generator().manual_seed(int(indices[0]))
    first = torch.randn(len(indices), 3, 4, generator=generator)
    first[:, 0, 0], first[:, 0, 1], first[:, 0, 2] = torch.nan, -0.0, 1e-42
    return first, indices * (1 << 40), torch.randn(len(indices), 5, generator=generator).bfloat16()


def same(found: tuple[Tensor, ...] | None, expected: tuple[Tensor, ...]) -> bool:
    assert found is not None
    return all(
        (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        and ours.contiguous().view(-1).view(torch.uint8).equal(theirs.contiguous().view(-1).view(torch.uint8))
        for ours, theirs in zip(found, expected, strict=True)
    )


def rows_file(folder: Path) -> Path:
    (found,) = folder.glob("*/rows")
    return found


def test_what_was_put_is_read_bit_for_bit_by_another(tmp_path: Path) -> None:
    indices = torch.tensor([7, 99, 0])
    first = lessons(tmp_path)
    assert first.get(indices) is None
    first.put(indices, answers(indices))
    assert same(lessons(tmp_path).get(indices), answers(indices))
    swapped = lessons(tmp_path).get(indices.flip(0))
    assert same(swapped, tuple(part.flip(0) for part in answers(indices)))
    assert first.get(torch.tensor([7, 1])) is None, "all rows or none"
    assert rows_file(tmp_path).stat().st_blocks * 512 < ROWS * 1000, "no room is taken for rows that are not there"


def test_a_teacher_is_asked_once(tmp_path: Path) -> None:
    indices, asked = torch.tensor([1, 2]), []

    def ask() -> tuple[Tensor, ...]:
        asked.append(1)
        return answers(indices)

    for _ in range(3):
        assert same(lessons(tmp_path).get_or_compute(indices, ask), answers(indices))
    assert len(asked) == 1


def test_what_is_not_contiguous_is_kept_as_it_is(tmp_path: Path) -> None:
    cache = lessons(tmp_path, parts=(TensorSpec((2, 3), torch.float32),))
    given = torch.arange(12.0).view(2, 3, 2).transpose(1, 2)
    cache.put(torch.tensor([4, 5]), (given,))
    assert same(cache.get(torch.tensor([4, 5])), (given.contiguous(),))


@pytest.mark.parametrize("byte", [0, 30, -1, -6])
def test_a_torn_row_is_not_there_until_it_is_put_again(byte: int, tmp_path: Path) -> None:
    cache, indices = lessons(tmp_path), torch.tensor([3, 4])
    cache.put(indices, answers(indices))
    size = rows_file(tmp_path).stat().st_size // ROWS
    with rows_file(tmp_path).open("r+b") as stream:
        stream.seek(4 * size + byte % size)
        (was,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([was ^ 0x10]))
    assert cache.get(torch.tensor([4])) is None
    assert cache.get(torch.tensor([3])) is not None
    cache.put(indices, answers(indices))
    assert same(cache.get(indices), answers(indices))


def test_a_row_of_zeros_and_a_row_in_anothers_place_are_none(tmp_path: Path) -> None:
    cache = lessons(tmp_path)
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
    lessons(tmp_path).put(indices, answers(indices))
    other = lessons(tmp_path, FACTS | change)
    assert other.get(indices) is None
    assert len(list(tmp_path.glob("*/rows"))) == 2
    assert {json.loads(file.read_text())["facts"].get("seed") for file in tmp_path.glob("*/facts.json")} <= {3, 4}


def test_other_parts_are_another_file_and_more_rows_are_not(tmp_path: Path) -> None:
    indices = torch.tensor([99])
    lessons(tmp_path).put(indices, answers(indices))
    lessons(tmp_path, parts=(*PARTS, TensorSpec((1,), torch.float32)))
    assert len(list(tmp_path.glob("*/rows"))) == 2
    assert same(lessons(tmp_path, rows=10 * ROWS).get(indices), answers(indices))
    assert same(lessons(tmp_path).get(indices), answers(indices))


@pytest.mark.parametrize("content", ["{", '{"facts": {}}'])
def test_facts_that_are_not_the_same_are_refused(content: str, tmp_path: Path) -> None:
    lessons(tmp_path)
    (facts,) = tmp_path.glob("*/facts.json")
    facts.write_text(content)
    with pytest.raises(ConfigError, match=r"is not of this teacher, these images and these settings: remove"):
        lessons(tmp_path)


def test_a_place_that_is_no_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep the teacher's answers"):
        lessons(tmp_path / "file")


def test_too_many_gigabytes_are_refused_before_they_are_taken() -> None:
    parts = (TensorSpec((196, 768), torch.float32),)
    check_cache_size(1000, parts, 0.7, "cache.gigabytes")
    with pytest.raises(ConfigError) as caught:
        check_cache_size(1_281_167, parts, 100, "cache.gigabytes")
    assert str(caught.value) == (
        "cache.gigabytes=100, but the teacher's answers on 1,281,167 views of images take up to 771.4 GB (0.6 MB each): "
        "allow as much, or keep none"
    )


def test_rows_of_writers_that_were_killed_are_whole_or_not_there(tmp_path: Path) -> None:
    """Two processes write the same rows at once, and both are killed with SIGKILL in the middle, ten times."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "teacher_cache_writer.py"), str(tmp_path)]
    chance, found, every = random.Random(5), 0, torch.arange(teacher_cache_writer.ROWS)
    with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(10):
            process.stdin.write("two\n")
            process.stdin.flush()
            children = [int(word) for word in process.stdout.readline().split()]
            time.sleep(chance.uniform(0.0, 0.05))
            for child in children:
                os.kill(child, signal.SIGKILL)
            cache = teacher_cache_writer.opened(tmp_path)
            for row in every.split(1):
                kept = cache.get(row)
                found += kept is not None
                assert kept is None or same(kept, teacher_cache_writer.answers(row))
            cache.close()
        process.stdin.close()
    assert found, "they did write"
    cache = teacher_cache_writer.opened(tmp_path)
    cache.put(every, teacher_cache_writer.answers(every))
    assert same(cache.get(every), teacher_cache_writer.answers(every))


FULL = """
import logging, resource, sys, torch
from pathlib import Path
from distill.teacher_cache import Lessons, Part
logging.basicConfig(format="%(message)s")
cache = Lessons(Path(sys.argv[1]), {}, 100, (Part((1000,), torch.float32),))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for row in range(100):
    cache.put(torch.tensor([row]), (torch.full((1, 1000), float(row)),))
print([row for row in range(100) if cache.get(torch.tensor([row])) is not None])
"""


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stdout == "[0, 1]\n"
    assert ended.stderr.count("the teacher's answers are kept no longer") == 1
