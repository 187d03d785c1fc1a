"""The newest rows of a metrics.jsonl, read backwards: a long file costs no more than a short one."""

import itertools
import json
from pathlib import Path

import pytest

from foveal.tracking import tail
from foveal.tracking.tail import read_last_rows

NUM_ROWS = 200_000


def num_bytes_read() -> int:
    """Bytes that this process has read so far, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "_BACKWARD_CHUNK_BYTES", 7)


def steps_of(file: Path, *limits: int) -> list[float]:
    return [row["step"] for row in read_last_rows(file, *limits)]


def test_a_few_rows_of_a_long_file_cost_a_chunk(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as stream:
        stream.writelines(f'{{"step": {step}, "loss": 0.5, "padding": "{"x" * 60}"}}\n' for step in range(NUM_ROWS))
    before = num_bytes_read()
    newest = [row["step"] for row in itertools.islice(read_last_rows(file), 100)]
    assert newest == list(range(NUM_ROWS - 1, NUM_ROWS - 101, -1))
    assert num_bytes_read() - before < 2 * (1 << 16) < file.stat().st_size / 50
    before = num_bytes_read()
    rows = list(read_last_rows(file))
    assert 5000 < len(rows) < NUM_ROWS / 10
    assert num_bytes_read() - before < tail.MAX_TAIL_BYTES + 4096


@pytest.mark.usefixtures("small_chunks")
def test_lines_may_lie_across_chunks(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for count in range(12):
        file.write_text("".join(json.dumps({"step": step, "loss": 10.0**step}) + "\n" for step in range(count)))
        assert steps_of(file) == list(range(count - 1, -1, -1))


@pytest.mark.usefixtures("small_chunks")
def test_what_is_no_row_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 1.0}\n'
    file.write_bytes(f'{good}garbage\n[1]\n{{"step": "x"}}\n{{"step": NaN}}\n{good}'.encode() + b"\0" * 40)
    assert steps_of(file) == [1, 1]
    file.write_text(good + '{"step": 2, "lo')  # being written
    assert steps_of(file) == [1]
    file.write_text("")
    assert steps_of(file) == []
    assert steps_of(tmp_path / "nowhere") == []


def test_metrics_of_0_1_get_their_names_and_a_limit_holds(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = '{"step": 5, "val_map": 0.5}\n'
    file.write_text(line * 3)
    assert list(read_last_rows(file, len(line))) == []  # the line's beginning may lie before it
    assert list(read_last_rows(file, len(line) + 1)) == [{"step": 5, "val_mAP": 0.5}]
