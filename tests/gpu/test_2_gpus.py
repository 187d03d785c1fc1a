"""Two GPUs: NCCL, sums of gradients, and one curve whatever the engine; a lost rank."""

import importlib.util
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives import collectives_of_a_step
from engines import Shape, Tiny
from ranks import Ranks
from runs_on_gpus import Row, Training, curve, require_libraries, start_ranks

from foveal.distributed.world import World
from foveal.errors import TrainingHungError

pytestmark = pytest.mark.gpu
STEPPING = Path(__file__).parents[1] / "support" / "stepping.py"
Reference = Callable[..., list[Row]]
ENGINES = {
    "ddp": ("engine.kind=accelerate",),
    "zero 1": ("engine.kind=deepspeed", "engine.zero=1"),
    "zero 2": ("engine.kind=deepspeed", "engine.zero=2"),
    "zero 3": ("engine.kind=deepspeed", "engine.zero=3"),
    "fsdp2": ("engine.kind=accelerate", "engine.sharding=fsdp2"),
    "zero 0": ("engine.kind=deepspeed", "engine.zero=0"),
}
SHAPES = {
    "ddp": Shape(2, "accelerate", precision="bf16"),
    "fsdp2": Shape(2, "accelerate", sharding="fsdp2", precision="bf16"),
    **{f"zero {zero}": Shape(2, "deepspeed", zero, precision="bf16") for zero in range(4)},
}
_TRAINED = sum(parameter.numel() for parameter in Tiny().parameters() if parameter.requires_grad)
# docs/proofs.md: on other ranks 1e-5 in fp32; bf16 of equal microbatches, whose sums alone differ.
_CURVE = {"fp32": 1e-5, "bf16": 1e-4}
_TIMEOUT = 8  # seconds of a collective
_PATIENCE = 120  # seconds until two ranks make steps


def introduce(world: World) -> tuple[str, str, float]:
    """The backend, this rank's device by its name and identity, and a sum over ranks."""
    properties = torch.cuda.get_device_properties(world.device) if world.device.type == "cuda" else None
    identity = f"{world.device} {getattr(properties, 'uuid', world.rank)}"
    return dist.get_backend(), identity, world.all_reduce_sum(torch.ones(1 << 20, device=world.device)).sum().item()


def test_nccl_starts_on_two_devices(two_gpus: Ranks) -> None:
    said = two_gpus.call(introduce)
    assert {backend for backend, _, _ in said} == {"nccl" if torch.cuda.is_available() else "gloo"}
    assert len({identity for _, identity, _ in said}) == 2
    assert {total for _, _, total in said} == {2 * (1 << 20)}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_bf16_products_are_summed_in_fp32(name: str, two_gpus: Ranks) -> None:
    require_libraries([SHAPES[name].kind])
    for seen, _ in two_gpus.call(collectives_of_a_step, SHAPES[name]):
        reductions = [each for each in seen if each.is_reduction]
        assert {each.dtype for each in reductions} == {torch.float32}
        assert sum(each.elements for each in reductions) >= _TRAINED


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_one_curve_on_one_and_two(
    name: str, precision: str, two_gpus: Ranks, train: Training, reference: Reference
) -> None:
    settings = (f"engine.precision={precision}", "batch.max_micro_size=16")
    # In bf16 ZeRO 3 rounds a product before it adds the bias: its sums are compared with its own on one GPU.
    own = ENGINES[name] if (name, precision) == ("zero 3", "bf16") else ()
    two = train(two_gpus, "run", *settings, *ENGINES[name])
    one = reference("gpu", *settings, *own)
    for metric in ("loss", "grad_norm") if precision == "fp32" else ("loss",):
        assert curve(two, metric) == pytest.approx(curve(one, metric), rel=_CURVE[precision]), metric


def test_a_run_moves_between_one_and_two(
    two_gpus: Ranks, one_gpu: Ranks, train: Training, reference: Reference
) -> None:
    sharded = ENGINES["zero 3" if importlib.util.find_spec("deepspeed") else "fsdp2"]
    train(one_gpu, "run", "run.stop_at_step=8")
    train(two_gpus, "run", *sharded, "run.stop_at_step=16")
    rows = train(one_gpu, "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert curve(rows) == pytest.approx(curve(reference("gpu", "engine.precision=fp32")), rel=_CURVE["fp32"])


def test_a_killed_rank_is_named_and_ends_the_other(two_gpus: Ranks, tmp_path: Path) -> None:
    """NCCL itself waits for a peer that is gone: only time limits end the other rank."""
    ranks = start_ranks(2, [STEPPING, tmp_path, str(_TIMEOUT), "none", "1"], tmp_path)
    file, limit = tmp_path / "rank-001.step", time.monotonic() + _PATIENCE
    while not (file.exists() and int(file.read_text() or 0) >= 50):
        assert time.monotonic() < limit and ranks[1].process.poll() is None, "no steps"
        time.sleep(0.05)
    ranks[1].process.send_signal(signal.SIGKILL)
    other = ranks[0].ended()
    log = (tmp_path / "rank-000.log").read_text()
    assert other.code == TrainingHungError.exit_code, other.err + log
    assert re.search(r"rank 1 on \S+ in step \d+: ", log)
    assert ranks[1].ended().code == -signal.SIGKILL


def test_a_rank_that_hangs_is_named_and_ended(two_gpus: Ranks, tmp_path: Path) -> None:
    """The other one waits for it, and both end before NCCL's own watchdog would abort the process."""
    ranks = start_ranks(2, [STEPPING, tmp_path, str(_TIMEOUT), "sleep", "1"], tmp_path)
    ended = [rank.ended() for rank in ranks]
    logs = [(tmp_path / f"rank-{rank:03d}.log").read_text() for rank in range(2)]
    assert [each.code for each in ended] == [TrainingHungError.exit_code] * 2, (ended, logs)
    for log in logs:
        assert re.search(r"the others wait for rank 1 on \S+ in step 200: data", log)
