"""The trace covers exactly the configured steps and does not change a run."""

import errno
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, stage_named

from foveal.errors import ConfigError
from foveal.training.config import LogConfig
from foveal.training.meters import profiler
from foveal.training.meters.profiler import profile_steps


def iter_steps(start: int, stop: int) -> Iterator[int]:
    for step in range(start, stop):
        torch.ones(step + 1).sum()
        yield step + 1


def trace_names(folder: Path, start: int, stop: int, span: tuple[int, int] | None) -> list[str]:
    """Run steps and return the names of the traces written."""
    assert list(profile_steps(iter_steps(start, stop), start, span, folder)) == list(range(start + 1, stop + 1))
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("start", "stop", "span", "name"),
    [
        (0, 6, (2, 3), "steps-00000002-00000003.json.gz"),
        (0, 6, (1, 1), "steps-00000001-00000001.json.gz"),
        (2, 6, (1, 4), "steps-00000003-00000004.json.gz"),  # resumed in between
        (0, 3, (2, 9), "steps-00000002-00000003.json.gz"),  # over before
        (4, 6, (1, 4), None),
        (0, 2, (3, 4), None),
        (0, 2, None, None),
    ],
)
def test_the_trace_is_of_the_steps_that_were_asked_for(
    start: int, stop: int, span: tuple[int, int] | None, name: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "profile"
    assert trace_names(folder, start, stop, span) == ([name] if name else [])
    if name and span:
        events = json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"]
        ones = [event for event in events if event.get("name") == "aten::ones"]
        assert len(ones) == min(span[1], stop) - max(span[0], start + 1) + 1


def test_who_stops_early_has_what_was_traced(tmp_path: Path) -> None:
    steps: Any = profile_steps(iter_steps(0, 9), 0, (2, 5), tmp_path)
    for _ in range(3):
        next(steps)
    steps.close()
    assert [file.name for file in tmp_path.iterdir()] == ["steps-00000002-00000003.json.gz"]


@pytest.mark.parametrize("failure", ["refused", "truncated"])
def test_a_disk_without_room_loses_the_trace_alone(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failure == "refused":
        monkeypatch.setattr(profiler.gzip, "open", full)
    else:
        monkeypatch.setattr(profiler, "_is_complete_json", lambda _: False)
    assert trace_names(tmp_path / "profile", 0, 3, (1, 2)) == []
    assert "steps-00000001-00000002.json.gz is not written" in caplog.text


@pytest.mark.parametrize("span", [[3, 2], [0, 2], [-1, 1]])
def test_no_such_steps(span: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"log\.profile_steps=.* must be \[first, last\], counted from 1"):
        LogConfig.from_dict({"profile_steps": span}, "the test")


def test_a_run_is_the_same_with_it(configs: dict[str, Path], one_rank: Ranks, tmp_path: Path) -> None:
    stage, plain = stage_named("pretrain"), ("engine.kind=plain", "run.stop_at_step=4")
    without = one_rank.train(stage, configs["pretrain"], tmp_path / "without", *plain)
    traced = one_rank.train(stage, configs["pretrain"], tmp_path / "with", *plain, "log.profile_steps=[2, 3]")
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in traced] == [row[name] for row in without]
    assert [file.name for file in (tmp_path / "with" / "profile").iterdir()] == ["steps-00000002-00000003.json.gz"]
    assert not (tmp_path / "without" / "profile").exists()
