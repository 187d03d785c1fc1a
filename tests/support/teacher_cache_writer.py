"""Processes that write to a teacher cache until they are killed: ``python tests/support/teacher_cache_writer.py FOLDER``."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from distill.teacher_cache import TeacherCache, TensorSpec

ROWS = 16
PARTS = (TensorSpec((1 << 18,), torch.float32),)  # a megabyte: a kill often interrupts the write of a row


def answers(indices: Tensor) -> tuple[Tensor]:
    """Rows with distinct values everywhere, so that a mixture of two rows shows."""
    return (indices[:, None].float() + torch.arange(1 << 18) / (1 << 19),)


def opened(folder: Path) -> TeacherCache:
    return TeacherCache(folder, {}, ROWS, PARTS)


def write(cache: TeacherCache, seed: int) -> None:
    """Write random rows until killed, or for a minute."""
    generator, end = torch.Generator().manual_seed(seed), time.monotonic() + 60
    while time.monotonic() < end:
        for rows in torch.randperm(ROWS, generator=generator).split(2):
            cache.put(rows, answers(rows))


def main(folder: Path) -> None:
    """Start two writing processes per line of stdin, and print their PIDs."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    for seed, _ in enumerate(sys.stdin):
        children = []
        for number in range(2):
            child = os.fork()
            if child == 0:
                write(opened(folder), 2 * seed + number)
                os._exit(0)
            children.append(child)
        sys.stdout.write(f"{children[0]} {children[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
