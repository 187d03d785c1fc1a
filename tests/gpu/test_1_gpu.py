"""One GPU computes what a CPU does, and a stop changes nothing."""

from collections.abc import Callable

import pytest
from ranks import Ranks
from runs_on_gpus import Row, Training, curve
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu
Reference = Callable[..., list[Row]]
BF16 = "engine.precision=bf16"
# Against the CPU: of the first step, before an update has magnified it, and of 24 steps. bf16 products round at 2^-8.
_FIRST = {"fp32": 1e-5, "bf16": 5e-3}
_CURVE = {"fp32": 1e-4, "bf16": 1e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_curve_is_the_cpus(precision: str, one_gpu: Ranks, reference: Reference) -> None:
    settings = f"engine.precision={precision}"
    on_gpu, on_cpu = reference("gpu", settings), reference("cpu", settings)
    for name in ("loss", "grad_norm"):
        ours, theirs = curve(on_gpu, name), curve(on_cpu, name)
        assert len(ours) == 24
        assert ours[0] == pytest.approx(theirs[0], rel=_FIRST[precision]), name
    assert curve(on_gpu) == pytest.approx(curve(on_cpu), rel=_CURVE[precision])
    assert curve(on_gpu)[-1] < 0.9 * curve(on_gpu)[0], "it learns, so that a curve says something"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_give_the_curve_of_eager_ones(
    precision: str, one_gpu: Ranks, reference: Reference, train: Training
) -> None:
    settings = f"engine.precision={precision}"
    eager = reference("gpu", settings, "engine.compile=false")
    compiled = train(one_gpu, "compiled", settings, "engine.compile=blocks")
    assert curve(compiled)[0] == pytest.approx(curve(eager)[0], rel=_FIRST[precision])
    assert curve(compiled) == pytest.approx(curve(eager), rel=_CURVE[precision])


LONG = ("model.patch=2", "batch.max_micro_size=8")  # 257 tokens in the decoder: several blocks of keys in a kernel
RESUMED = {
    "plain": ("engine.kind=plain",),
    "plain, bf16": ("engine.kind=plain", BF16, "engine.compile=false"),
    "plain, bf16, compiled": ("engine.kind=plain", BF16, "engine.compile=blocks"),
    "zero 1, bf16": ("engine.kind=deepspeed", BF16),
    "zero 3": ("engine.kind=deepspeed", "engine.zero=3"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_changes_no_bit_of_short_sequences(name: str, one_gpu: Ranks, train: Training) -> None:
    """Attention's backward adds in one order where all keys fit in one block of a kernel: 17 and 65 tokens do."""
    settings = (*RESUMED[name], "epochs=2")
    whole = train(one_gpu, "whole", *settings)
    train(one_gpu, "parts", *settings, "run.stop_at_step=9")
    parts = train(one_gpu, "parts", *settings)
    assert len(whole) == 16
    for metric in ("loss", "grad_norm", "lr"):
        assert curve(parts, metric) == curve(whole, metric)
    left, right = (load_file(train.run(each) / "export" / "model.safetensors") for each in ("parts", "whole"))
    assert left.keys() == right.keys()
    assert [key for key in left if not left[key].equal(right[key])] == []


def test_a_resume_of_long_sequences_is_rounding(one_gpu: Ranks, train: Training) -> None:
    """Flash attention's backward adds with atomics there: bits are not promised, the curve is."""
    whole = train(one_gpu, "whole", *LONG, "epochs=1")
    train(one_gpu, "parts", *LONG, "epochs=1", "run.stop_at_step=3")
    assert curve(train(one_gpu, "parts", *LONG, "epochs=1")) == pytest.approx(curve(whole), rel=_CURVE["fp32"])


def test_a_checkpoint_goes_on_on_the_cpu_and_back(
    one_gpu: Ranks, one_cpu: Ranks, train: Training, reference: Reference
) -> None:
    train(one_gpu, "run", "run.stop_at_step=8")
    train(one_cpu, "run", "run.stop_at_step=16")
    rows = train(one_gpu, "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert curve(rows) == pytest.approx(curve(reference("cpu", "engine.precision=fp32")), rel=_CURVE["fp32"])
