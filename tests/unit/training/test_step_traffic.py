"""What a step costs between ranks and between host and device, counted under a spy for every engine."""

import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from engines import SHAPES, Shape
from loop_steps import IMAGES, OPTIM, Tiny, batches, build_tiny_engine, classify, loop_context
from ranks import Ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.distributed.host_collectives import HostCollectives
from foveal.distributed.world import World
from foveal.engines.build import build_engine
from foveal.optim.optimizers import parameter_groups
from foveal.training.loop import RankFlags, run_steps
from foveal.training.meters.host_copy import HostCopy
from foveal.training.rollback import RollbackController
from foveal.training.run import Run

MICROS, WARMUP, STEADY = 2, 2, 10  # after the warm-up DDP has ordered its buckets, and moments exist
OWN_PACKAGES = ("foveal", "pretrain", "distill", "finetune")
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
READING_OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")  # wait for a GPU, from C++ too
ENGINES = ("foveal.engines.", "foveal.optim.")
HOST_MESSAGES = "foveal.distributed.host_collectives."  # its tensors are messages
HOST_CALLS = ("all_reduce", "all_gather", "broadcast")


def find_caller() -> str:
    """Return "module.function" of the innermost frame in the product."""
    frame = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(OWN_PACKAGES) and "<locals>" not in frame.f_code.co_qualname:
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@dataclass
class Traffic:
    """Calls by (operation, device, caller): of tensors' groups, of processors' groups; and reads of tensors."""

    device: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    host: Counter[tuple[str, str]] = field(default_factory=Counter)
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)


class OperatorSpy(TorchDispatchMode):
    """Counts collectives and reads that reach torch's dispatcher, those that C++ starts included."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "wait_tensor" not in func.name():
            first: Any = args[0]
            while not isinstance(first, Tensor):
                first = first[0]
            self._traffic.device[func.name().split("::")[1], first.device.type, find_caller()] += 1
        if func.name() in READING_OPERATORS:
            self._traffic.reads[func.name(), find_caller()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def spied(traffic: Traffic) -> Iterator[None]:
    """Count the traffic of this rank."""

    def count(owner: type, name: str, counter: Counter[tuple[str, str]], patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counter[name, find_caller()] += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)

    with pytest.MonkeyPatch.context() as patch, OperatorSpy(traffic):
        for name in READS:
            count(Tensor, name, traffic.reads, patch)
        for name in HOST_CALLS:
            count(HostCollectives, name, traffic.host, patch)
        yield


def run_spied_steps(world: World, shape: Shape) -> Traffic:
    """Return the traffic of steady steps, with the stage's question whether to leave."""
    model, traffic = Tiny(), Traffic()
    engine = build_tiny_engine(model, shape.config, world, MICROS)
    flags = RankFlags(is_writing=True)
    context = replace(loop_context(0, WARMUP + STEADY + 1, MICROS, lambda _: 1e-2, world), read_flags=lambda: flags)
    stream = chain.from_iterable(batches(world.rank, world.size, MICROS) for _ in range(WARMUP + STEADY))
    steps = run_steps(engine, stream, classify(), context)
    for _ in range(WARMUP):
        next(steps)
    with spied(traffic):
        for step in steps:
            assert step.flags == flags and not Run.check_preemption(cast("Any", SimpleNamespace()), step.flags)
            assert step.result is not None
            if step.index == WARMUP + STEADY:
                break
    return traffic


_SHAPES = [
    pytest.param(name, marks=() if name in ("plain", "zero 1, 2 ranks", "ddp, 2 ranks") else pytest.mark.thorough)
    for name in SHAPES
    if name == "plain" or "1 ranks" not in name
]


@pytest.mark.parametrize("name", _SHAPES)
def test_a_step_reduces_gradients_on_the_device_agrees_between_processors_and_reads_nothing(
    name: str, one_rank: Ranks, two_ranks: Ranks
) -> None:
    shape = SHAPES[name]
    for traffic in {1: one_rank, 2: two_ranks}[shape.ranks].call(run_spied_steps, shape):
        assert traffic.host == ({("all_reduce", "foveal.distributed.world.run_all"): STEADY} if shape.ranks > 1 else {})
        foreign = {key[:3:2] for key in traffic.device if not key[2].startswith(ENGINES)}
        gathers = (
            {("_allgather_base_", "finetune.tasks.classify.__call__")} if "fsdp2" in name or "zero 3" in name else set()
        )
        assert foreign <= gathers, "besides its engine, a step asks nothing of the device's group"
        if name == "plain":
            assert not traffic.device
        if name == "ddp, 2 ranks":
            assert [(key[0], count) for key, count in traffic.device.items()] == [("allreduce_", STEADY)], "one bucket"
        reads = {key: count for key, count in traffic.reads.items() if not key[1].startswith(HOST_MESSAGES)}
        weight = "foveal.training.loop._sum_weights"  # a number on the host
        one_hot = "finetune.tasks.classify.compute_targets"  # torch's checks its range, on CPUs only
        assert reads == {
            ("__float__", weight): STEADY,
            ("aten::_local_scalar_dense", weight): STEADY,
            ("aten::_local_scalar_dense", one_hot): 2 * MICROS * STEADY,
        }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loop_does_not_wait_for_a_gpu() -> None:
    """torch raises at every read of the device and every blocking copy, in ten steady steps."""
    world = World(0, 1, 0, "none", torch.device("cuda", 0))
    model = Tiny()
    cfg = SHAPES["plain"].config
    engine = build_engine(
        model, parameter_groups(model, OPTIM), OPTIM, cfg, world, microbatch_size=IMAGES, accumulation_steps=1
    )
    pinned = [
        replace(batch, **{name: value.pin_memory() for name, value in batch.tensors().items()})
        for _ in range(4)
        for batch in batches(0, 1, 1)
    ]
    context = loop_context(0, len(pinned), 1, lambda _: 1e-2, world)
    steps, unread, applied = run_steps(engine, iter(pinned), classify(), context), deque[HostCopy](), []
    for _ in range(WARMUP):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps:
            assert step.result is not None
            unread.append(HostCopy(step.result.applied))
            if len(unread) > RollbackController.steps_in_flight:
                applied.append(unread.popleft().read())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert applied == [True] * (len(pinned) - WARMUP - RollbackController.steps_in_flight)
