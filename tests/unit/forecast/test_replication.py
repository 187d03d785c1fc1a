"""`foveal plan` names the engine that is faster because everything fits on every GPU, and prints it beside the network."""

from pathlib import Path

import pytest
from plans import forecast

from foveal.forecast.forecast import Forecast
from foveal.forecast.replication import find_replication
from foveal.forecast.report import _disk_and_network_lines

LARGE = 80e9  # bytes of a GPU


def zero1(configs: dict[str, Path], *overrides: str, ranks: int = 2, memory: float | None = LARGE) -> Forecast:
    """The tiny pretraining, under ZeRO 1 unless an override says otherwise."""
    return forecast("pretrain", configs["pretrain"], *overrides, ranks=ranks, gpu_memory_bytes=memory)


def test_ddp_sends_less_than_what_shards(configs: dict[str, Path]) -> None:
    made = zero1(configs)
    weights = 4 * made.parameter_counts.trainable
    faster = find_replication(made)
    assert faster is not None
    assert faster.settings == "engine.kind=accelerate"
    assert (faster.sent_bytes, faster.configured_sent_bytes) == (weights, 1.5 * weights)
    sharded = zero1(configs, "engine.kind=accelerate", "engine.sharding=fsdp2")
    assert (faster := find_replication(sharded)) is not None
    assert faster.settings == "engine.sharding=ddp"
    assert faster.sent_bytes < faster.configured_sent_bytes


def test_one_gpu_shards_nothing(configs: dict[str, Path]) -> None:
    faster = find_replication(zero1(configs, ranks=1))
    assert faster is not None
    assert (faster.settings, faster.sent_bytes) == ("engine.kind=plain", 0)


@pytest.mark.parametrize("setting", ["engine.zero=0", "engine.zero=3", "engine.kind=accelerate"])
def test_what_sends_as_little_is_left_alone(setting: str, configs: dict[str, Path]) -> None:
    assert find_replication(zero1(configs, setting)) is None


def test_memory_decides(configs: dict[str, Path]) -> None:
    """The GPU needs room beside the estimate, and nothing is said where its memory is unknown."""
    fits = find_replication(zero1(configs))
    assert fits is not None
    assert find_replication(zero1(configs, memory=fits.required_bytes / 0.95)) is None
    assert find_replication(zero1(configs, memory=fits.required_bytes / 0.85)) is not None
    assert find_replication(zero1(configs, memory=None)) is None


def test_the_lines_of_the_plan(configs: dict[str, Path]) -> None:
    two_gpus = "\n".join(_disk_and_network_lines(zero1(configs)))
    assert "          faster: engine.kind=accelerate, because everything fits without sharding (" in two_gpus
    assert " GB pinned for images that are read ahead; up to 1.02 GB of 2 x up to 16 processes" in two_gpus
    one_gpu = "\n".join(_disk_and_network_lines(zero1(configs, "data.workers=0", ranks=1)))
    assert "faster: engine.kind=plain, because one GPU shards nothing" in one_gpu
    assert "pinned for images" not in one_gpu
