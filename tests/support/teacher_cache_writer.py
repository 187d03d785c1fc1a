"""Processes that write a teacher's answers until they are killed: ``python tests/support/teacher_cache_writer.py FOLDER``."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from distill.teacher_cache import TeacherCache, TensorSpec

ROWS = 16
PARTS = (TensorSpec((1 << 18,), torch.float32),)  # a megabyte: a kill often falls into the writing of one


def answers(indices: Tensor) -> tuple[Tensor]:
    """Rows whose every number is their own, so that a mixture of two would show."""
    return (indices[:, None].float() + torch.arange(1 << 18) / (1 << 19),)


def opened(folder: Path) -> TeacherCache:
    return TeacherCache(folder, {}, ROWS, PARTS)


def write(cache: TeacherCache, seed: int) -> None:
    """Until somebody ends it, or a minute is over."""
    generator, end = torch.Generator().manual_seed(seed), time.monotonic() + 60
    while time.monotonic() < end:
        for rows in torch.randperm(ROWS, generator=generator).split(2):
            cache.put(rows, answers(rows))


def main(folder: Path) -> None:
    """For every line of the input: two processes that write; their numbers are printed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
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
