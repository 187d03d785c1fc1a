"""A run that is killed, asked to leave and continued under another ZeRO stage, against one left alone. Run by gpu.py.

Every start is a process, as a user starts it.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_training import Bench
from safetensors.torch import load_file

EVERY = 12  # steps between checkpoints
STEPS = 3 * EVERY
# A step, and the signal after it.
STOPS = ((EVERY + EVERY // 2, signal.SIGKILL), (2 * EVERY + EVERY // 2, signal.SIGTERM))
_START_SECONDS = 300.0  # of one start, at most


@dataclass(frozen=True)
class Trained:
    """A finished run, and its rows."""

    folder: Path
    rows: list[dict[str, float]]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of its newest checkpoint."""
        newest = max((self.folder / "checkpoints").glob("step-*"))
        return {key: value for file in newest.glob("*.safetensors") for key, value in load_file(file).items()}


class Start:
    """A process of a run; its output is in a file beside the run's folder."""

    def __init__(self, bench: Bench, folder: Path, zero: int) -> None:
        self._folder, self._output = folder, folder.with_suffix(".out")
        settings = (
            f"engine.zero={zero}", f"run.stop_at_step={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=1",
            "log.every=3", "log.images_every=0", "tracking.uri=null", f"run.dir={folder}",
        )  # fmt: skip
        command = [sys.executable, "-m", "pretrain.run", "mae_vit_b16", *bench.overrides(*settings)]
        with self._output.open("a") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        self._deadline = time.monotonic() + _START_SECONDS

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""
        while not any(row["step"] >= step for row in read_rows(self._folder)):
            assert self._process.poll() is None and time.monotonic() < self._deadline, self._failure()
            time.sleep(0.1)

    def end(self, stop: signal.Signals | None = None) -> None:
        """Wait for the process, after a signal if there is one."""
        if stop is not None:
            self._process.send_signal(stop)
        code = self._process.wait(max(1.0, self._deadline - time.monotonic()))
        assert code == (-stop if stop == signal.SIGKILL else 0), self._failure()

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        self._process.wait()

    def _failure(self) -> str:
        return f"{self._folder.name}: {self._output.read_text()[-2000:]}"


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics so far."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def describe_difference(one: Trained, other: Trained) -> str:
    """Say how far two runs are from each other."""
    assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
    loss = max(abs(mine["loss"] / its["loss"] - 1) for mine, its in zip(one.rows, other.rows, strict=True))
    first, second = one.tensors, other.tensors
    assert first.keys() == second.keys()
    equal = all(first[key].equal(second[key]) for key in first)
    verdict = "equal bit for bit" if equal else "differ"
    return f"largest difference of a loss {loss:.1e}; weights and moments at the end {verdict}"


def interrupted_lines(bench: Bench, folder: Path) -> Iterator[str]:
    """Train ViT-B/16 alone and, beside it on the same device, with interruptions."""
    folders = folder / "alone", folder / "interrupted"
    starts = [Start(bench, folders[0], zero=1)]
    try:
        for zero, (step, stop) in zip((1, 2), STOPS, strict=True):
            starts.append(Start(bench, folders[1], zero))
            starts[-1].wait_for_step(step)
            starts[-1].end(stop)
        starts.append(Start(bench, folders[1], zero=1))
        starts[-1].end()
        starts[0].end()
    finally:
        for start in starts:
            start.kill()
    yield from difference_lines([Trained(place, read_rows(place)) for place in folders])


def difference_lines(runs: Sequence[Trained]) -> Iterator[str]:
    """Yield what an uninterrupted and an interrupted run show."""
    alone, interrupted = runs
    (killed, _), (left, _) = STOPS
    saves = [row for row in alone.rows if "save_stall_ms" in row]
    yield (
        f"The loss of ViT-B/16 under ZeRO 1 falls from {alone.rows[0]['loss']:.4f} to {alone.rows[-1]['loss']:.4f} in {STEPS} "
        f"steps. Killed at step {killed}, asked to leave at step {left}, and continued under ZeRO 2 and then under ZeRO 1 "
        f"again, against the run that was left alone: {describe_difference(interrupted, alone)}."
    )
    if saves:
        stalls = ", ".join(f"{row['save_stall_ms']:.0f}" for row in saves)
        yield from ("", f"Saves stopped the run that was left alone, beside the other one, for {stalls} ms.")
