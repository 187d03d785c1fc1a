"""Processes that are ranks of one world and live as long as the test session: starting DeepSpeed takes seconds, once."""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT
from ports import free_port

from foveal.distributed.world import World, init_world
from foveal.errors import FovealError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.stage import Stage

PATIENCE = 240.0  # seconds for one call
_LINEAR = torch.nn.functional.linear  # ZeRO 3 replaces it for the rest of a process, and rounds otherwise in bf16
# What is made for people who look at a run: a second of each training, which a test of it asks for.
UNSEEN = ("tracking.uri=null", "log.final_pictures=false", "log.report=false")
_COLLECTIVE = 120  # seconds for one collective: a rank that waits for another that failed gives up


class Ranks:
    """``size`` joined processes, started at the first call; ``call`` runs a function of (world, ...) in all of them.

    ``patience``: seconds for one call.
    """

    def __init__(self, size: int, patience: float = PATIENCE) -> None:
        self._size, self._patience = size, patience
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def _start(self) -> None:
        if (room := devices()) is not None and self._size > room:
            pytest.skip(f"{self._size} ranks want as many GPUs, and here is {room}")
        port = free_port()
        for rank in range(self._size):
            here, there = CONTEXT.Pipe()
            told = (there, rank, self._size, port, dict(os.environ))
            process = CONTEXT.Process(target=_serve, args=told, daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned, by rank. An exception on any rank is raised here with its traceback."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(self._patience), f"rank {rank} did not answer within {self._patience} s"
            answers.append(pipe.recv())
        for rank, (failed, answer) in enumerate(answers):
            if isinstance(failed, FovealError):
                raise failed
            assert failed is None, f"rank {rank}:\n{answer}"
        return [answer for _, answer in answers]

    def train(self, stage: Stage[Any, Any], config: Path, run: Path, *overrides: str) -> list[dict[str, float]]:
        """Run a stage in all ranks; the rows of its metrics.jsonl."""
        self.call(enter_stage, stage.name, str(config), [f"run.dir={run}", *UNSEEN, *overrides])
        return read_rows_without_time(run / "metrics.jsonl")

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def devices() -> int | None:
    """How many GPUs there are; None: none, and ranks are processes on the CPU."""
    return torch.cuda.device_count() if torch.cuda.is_available() else None


def _serve(pipe: Connection, rank: int, size: int, port: int, environment: Mapping[str, str]) -> None:
    os.environ.clear()  # that of the server of forks, as old as its first fork
    os.environ.update(environment)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with init_world(_COLLECTIVE) as world:
        while (order := pipe.recv()) is not None:
            function, arguments = order
            try:
                pipe.send((None, function(world, *arguments)))
            except FovealError as error:
                pipe.send((error, None))
            except BaseException:  # noqa: BLE001 - whatever it was, the test wants to see it
                pipe.send((RuntimeError(), traceback.format_exc()))
    os._exit(0)  # what an interpreter with DeepSpeed in it puts away takes seconds, and nothing of it is left to anyone


def stage_named(name: str) -> Stage[Any, Any]:
    """pretrain, distill or finetune: a Stage holds functions, and travels by name."""
    import importlib

    return importlib.import_module(f"{name}.run").STAGE


def enter_stage(world: World, stage: str, config: str, overrides: Sequence[str]) -> None:
    """Run a stage in this rank, whatever ran here before."""
    torch.nn.functional.linear = _LINEAR
    found = stage_named(stage)
    run_stage(found, load_config(found.config_class, stage, config, overrides), world)
