"""A step stays cheap for the host, which starts its operations one by one while a GPU computes."""

import pytest
from loop_steps import ALONE
from operations import count_operations, pretraining_steps

from foveal.engines.config import EngineConfig

# Operations of a step of ViT-B's 12 + 8 blocks, and the same with views and allocations; benchmarks/results/host.md lists them.
_CEILINGS = {"fp32": (720, 2170), "bf16": (900, 2680)}
_DEVICE_READS = 1  # of a weight that is on the host


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_operations_and_device_reads_of_a_step(precision: str) -> None:
    cfg = EngineConfig.model_validate({"kind": "plain", "precision": precision})
    counter = count_operations(pretraining_steps(ALONE, cfg))
    operations, with_views = _CEILINGS[precision]
    assert counter.operations.total() <= operations, counter.operations.most_common(20)
    assert counter.operations.total() + counter.views.total() <= with_views, counter.views.most_common(20)
    assert counter.reads.total() <= _DEVICE_READS, counter.reads
