"""A step stays cheap for the host, which starts its operations one by one while a GPU computes."""

from collections import Counter

import pytest
import torch
from operations import OperationCounter, count_operations, pretraining_steps
from ranks import Ranks

from foveal.distributed.world import World
from foveal.engines.config import EngineConfig

# Operations of a step of ViT-B's 12 + 8 blocks, and the same with views and allocations; benchmarks/results/host.md lists them.
_CEILINGS = {
    ("plain", "fp32"): (720, 2170),
    ("plain", "bf16"): (900, 2680),
    ("deepspeed", "fp32"): (990, 3450),
    ("deepspeed", "bf16"): (1165, 3955),
}
_DEVICE_READS = 1  # of a weight that is on the host


def count_step(world: World, kind: str, precision: str) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return operations, views and device reads of a step."""
    cfg = EngineConfig.model_validate({"kind": kind, "precision": precision})
    counter = count_operations(pretraining_steps(world, cfg))
    return counter.operations, counter.views, counter.reads


@pytest.mark.parametrize(("kind", "precision"), list(_CEILINGS))
def test_operations_and_device_reads_of_a_step(kind: str, precision: str, one_rank: Ranks) -> None:
    """Under the plain engine, and under the default: ZeRO 1."""
    ((operations, views, reads),) = one_rank.call(count_step, kind, precision)
    most_operations, most_with_views = _CEILINGS[kind, precision]
    assert operations.total() <= most_operations, operations.most_common(20)
    assert operations.total() + views.total() <= most_with_views, views.most_common(20)
    assert reads.total() <= _DEVICE_READS, reads


def test_an_operation_a_view_and_a_read_are_counted() -> None:
    values = torch.ones(2, 3)
    with OperationCounter() as counter:
        (values.t() + 1).sum().item()
    assert counter.operations == Counter(add=1, sum=1, _local_scalar_dense=1)
    assert counter.views == Counter(t=1)
    assert counter.reads == {"test_step_operations.py:test_an_operation_a_view_and_a_read_are_counted": 1}
