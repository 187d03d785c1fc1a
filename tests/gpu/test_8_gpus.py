"""Eight GPUs: the rates of their links, one curve when weights and moments are sharded over all, and fewer afterwards."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ranks
from runs_on_gpus import Row, Training, curve, start_ranks

pytestmark = pytest.mark.gpu
Reference = Callable[..., list[Row]]
SHARDED = {
    "zero 1": ("engine.kind=deepspeed", "engine.zero=1"),
    "zero 2": ("engine.kind=deepspeed", "engine.zero=2"),
    "zero 3": ("engine.kind=deepspeed", "engine.zero=3"),
    "fsdp2": ("engine.kind=accelerate", "engine.sharding=fsdp2"),
}
MICRO = "batch.max_micro_size=4"
_REL = 1e-5  # docs/proofs.md: on other ranks, in fp32


@pytest.mark.parametrize("size", [2, 8])
def test_the_doctor_times_all_reduces(
    size: int, ranks_on: Callable[[int], Ranks], config: Path, tmp_path: Path
) -> None:
    ranks_on(size)
    run = [f"run.dir={tmp_path / 'run'}", "--stage", "pretrain"]
    ranks = start_ranks(size, ["-m", "foveal.cli", "doctor", config, "engine.kind=accelerate", *run], tmp_path)
    done = [rank.ended() for rank in ranks]
    assert {each.code for each in done} == {0}, done
    found = re.search(rf"all-reduce among {size} ranks: correct, (\S+) GB/s, (\d+) us for 8 bytes", done[0].out)
    assert found is not None, done[0].out
    assert float(found[1]) > 0


@pytest.mark.parametrize("name", SHARDED)
def test_one_curve_on_one_and_eight(name: str, eight_gpus: Ranks, train: Training, reference: Reference) -> None:
    one = reference("gpu", MICRO)
    eight = train(eight_gpus, "run", MICRO, *SHARDED[name])
    for metric in ("loss", "grad_norm"):
        assert curve(eight, metric) == pytest.approx(curve(one, metric), rel=_REL), metric


@pytest.mark.parametrize(("saved", "resumed"), [("zero 3", "zero 1"), ("fsdp2", "fsdp2")])
def test_saved_at_eight_and_resumed_at_four(
    saved: str,
    resumed: str,
    eight_gpus: Ranks,
    ranks_on: Callable[[int], Ranks],
    train: Training,
    reference: Reference,
) -> None:
    train(eight_gpus, "run", MICRO, *SHARDED[saved], "run.stop_at_step=9")
    rows = train(ranks_on(4), "run", MICRO, *SHARDED[resumed])
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert curve(rows) == pytest.approx(curve(reference("gpu", MICRO)), rel=_REL)
