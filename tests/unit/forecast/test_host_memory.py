"""Host memory that `foveal plan` counts, against the ranges that ranks write and the slabs that loaders allocate."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from plans import forecast

from foveal.checkpoint.chunks import count_bytes_to_write, replicated_chunk
from foveal.data.batch_plan import BatchPlan, EvaluationBatchPlan
from foveal.data.batch_stream import BatchStream
from foveal.data.row_arrays import RowLayout
from foveal.data.slab import Slab
from foveal.engines.config import EngineConfig
from foveal.forecast.host_memory import estimate_pinned_bytes
from foveal.forecast.trace import ParameterCounts
from foveal.optim.config import OptimConfig
from foveal.training.data_workers import plan_first_step

ELEMENTS = 3 << 20
FROZEN_BYTES = 16 << 20  # in the checkpoint, as an EMA encoder is
COUNTS = ParameterCounts(ELEMENTS, 0, (ELEMENTS,), (), FROZEN_BYTES, checkpoint_bytes=12 * ELEMENTS + FROZEN_BYTES)


def pinned(nodes: int, gpus_per_node: int, cfg: EngineConfig) -> int:
    return estimate_pinned_bytes(COUNTS, cfg, OptimConfig(), nodes=nodes, gpus_per_node=gpus_per_node)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 8), (3, 8), (4, 8), (40, 1)])
def test_writers_of_a_node(nodes: int, gpus: int) -> None:
    tensors = {part: torch.empty(ELEMENTS, device="meta") for part in ("weight", "exp_avg", "exp_avg_sq")}
    frozen = {"weight": torch.empty(FROZEN_BYTES // 4, device="meta")}
    copied = [
        count_bytes_to_write(
            [replicated_chunk(f"{values}", values, rank, nodes * gpus) for values in (tensors, frozen)]
        )
        for rank in range(nodes * gpus)
    ]
    rounded = [1 << (size - 1).bit_length() if size else 0 for size in copied]
    by_node = [sum(rounded[first : first + gpus]) for first in range(0, len(rounded), gpus)]
    assert pinned(nodes, gpus, EngineConfig(kind="accelerate")) == max(by_node)


def test_shards_are_copied_by_every_rank() -> None:
    """Of 36 MiB that are trained, and of 16 MiB that every rank holds under ZeRO 1 and that are sharded otherwise."""
    assert pinned(4, 8, EngineConfig(kind="deepspeed", zero=1)) == 4 * (2 << 20) + 4 * (4 << 20)
    assert pinned(4, 8, EngineConfig(kind="deepspeed", zero=3)) == 8 * (2 << 20)
    assert pinned(1, 4, EngineConfig(kind="accelerate", sharding="fsdp2")) == 4 * (16 << 20)


# --- loaders ---


class SlabsOnly:
    """The part of a pool of workers that allocates slabs; it starts no process and keeps what it allocated."""

    num_workers = 1

    def __init__(self) -> None:
        self.slabs: list[Slab] = []

    def take_slab(self, layout: RowLayout, num_slots: int) -> Slab:
        self.slabs.append(Slab(layout, num_slots))
        return self.slabs[-1]

    def begin_stream(self, *_arguments: Any) -> int:
        return 1


def test_slabs_are_those_that_streams_allocate(configs: dict[str, Path]) -> None:
    pool: Any = SlabsOnly()
    made = forecast("finetune", configs["finetune"], "data.workers=2")
    plan = made.plan
    source = plan.training_set.sources[0]
    rows = plan.cfg.batch.max_micro_size
    streams: list[BatchPlan] = [plan_first_step(plan, 0), EvaluationBatchPlan(source, plan.cfg.data, 0, 1, rows)]
    for stream in streams:
        BatchStream(pool, stream, plan.cfg.data.prefetch_batches)
    allocated = sum(os.fstat(slab.descriptor).st_size for slab in pool.slabs)
    for slab in pool.slabs:
        slab.close()
    assert made.loader_memory is not None
    assert (made.loader_memory.workers_per_rank, made.loader_memory.slab_bytes) == (2, allocated)


def test_only_runs_that_evaluate_have_a_second_slab(configs: dict[str, Path]) -> None:
    one, two = (
        forecast("pretrain", configs["pretrain"], "data.workers=1", f"evaluate_every={steps}").loader_memory
        for steps in (0, 5)
    )
    assert one is not None and two is not None
    assert one.slab_bytes < two.slab_bytes


def test_processes_count_by_rank_and_worker(configs: dict[str, Path]) -> None:
    def loader(workers: int | str, ranks: int = 1) -> Any:
        return forecast("pretrain", configs["pretrain"], f"data.workers={workers}", ranks=ranks).loader_memory

    assert loader(0) is None, "a rank that decodes has no slab"
    assert loader("auto").workers_per_rank == 16
    assert loader(3).process_bytes - loader(2).process_bytes == loader(2).process_bytes - loader(1).process_bytes > 0
    assert loader(1).process_bytes > loader(2).process_bytes - loader(1).process_bytes, "they share a server"
    assert loader(2, ranks=2).process_bytes == 2 * loader(2).process_bytes
