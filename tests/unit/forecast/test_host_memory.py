"""Host memory that `foveal plan` counts for the copy of a checkpoint, against the ranges that ranks write."""

import pytest
import torch

from foveal.checkpoint.chunks import replicated_chunk
from foveal.checkpoint.writer import count_bytes_to_write
from foveal.engines.config import EngineConfig
from foveal.forecast.host_memory import estimate_pinned_bytes
from foveal.forecast.trace import ParameterCounts
from foveal.optim.config import OptimConfig

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
