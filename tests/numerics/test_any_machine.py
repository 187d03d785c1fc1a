"""One curve on any machine, however often it was stopped: engines, ranks and accumulation are rounding, a stop is nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, stage_named
from safetensors.torch import load_file

_STEPS = 22  # an epoch
_REL = 1e-5
_BF16 = 1e-2  # what bf16 products make of a curve
_BF16_SUMS = 5e-5  # what a sum over ranks may, of equal microbatches: 0 was measured, and 9e-5 to 2e-4 of sums in bf16
_BF16_STEPS = 8  # later, a last bit of a sum crosses a rounding of bf16 once (distillation: 1e-4 from step 12)
_BUCKETS = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 5000}}"  # several, as large models have
_DDP, _FSDP2 = "engine.kind=accelerate", "engine.sharding=fsdp2"
_ACCELERATED = (_DDP, "engine.sharding=deepspeed", "engine.zero=2")
_SGD = ("optim.name=sgd", "optim.schedule=step", "optim.step_epochs=[0.5]")
thorough = pytest.mark.thorough

# Each is trained once whole, for the curve, and once in parts, for the bits.
MACHINES = [
    pytest.param(
        "pretrain", "one", ("engine.kind=plain", "batch.max_micro_size=8"), marks=thorough, id="pretrain, plain"
    ),
    pytest.param("pretrain", "one", ("engine.zero=3",), marks=thorough, id="pretrain, zero 3 alone"),
    pytest.param("pretrain", "two", ("engine.zero=0",), marks=thorough, id="pretrain, zero 0"),
    pytest.param(
        "pretrain", "two", ("engine.zero=1", "batch.max_micro_size=8", _BUCKETS), id="pretrain, zero 1 accumulated"
    ),
    pytest.param("pretrain", "two", ("engine.zero=2",), marks=thorough, id="pretrain, zero 2"),
    pytest.param("pretrain", "two", ("engine.zero=3", "batch.max_micro_size=16"), id="pretrain, zero 3 accumulated"),
    pytest.param(
        "distill", "two", ("engine.zero=2", "batch.max_micro_size=8", _BUCKETS), id="distill, zero 2 accumulated"
    ),
    pytest.param("finetune", "one", (_DDP, "batch.max_micro_size=16"), marks=thorough, id="finetune, accelerate alone"),
    pytest.param("finetune", "two", (_DDP, "batch.max_micro_size=8"), id="finetune, ddp accumulated"),
    pytest.param("finetune", "two", (_DDP, *_SGD), marks=thorough, id="finetune, ddp and sgd"),
    pytest.param("finetune", "two", (_DDP, _FSDP2, "batch.max_micro_size=8"), id="finetune, fsdp2 accumulated"),
    pytest.param(
        "finetune", "two", (*_ACCELERATED, "batch.max_micro_size=8"), marks=thorough, id="finetune, accelerated zero 2"
    ),
]


@pytest.fixture(scope="module")
def reference(
    one_rank: Ranks, configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, float]]]:
    """The curve of each stage under Plain, without accumulation."""
    curves: dict[tuple[str, ...], list[dict[str, float]]] = {}

    def curve(name: str, *settings: str) -> list[dict[str, float]]:
        if (name, *settings) not in curves:
            run = tmp_path_factory.mktemp("reference") / name
            overrides = ("engine.kind=plain", "batch.max_micro_size=64", *settings)
            curves[name, *settings] = one_rank.train(stage_named(name), configs[name], run, *overrides)
        return curves[name, *settings]

    return curve


def columns(rows: list[dict[str, float]], *names: str) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows if name in row] for name in names}


@pytest.mark.parametrize(("name", "ranks", "engine"), MACHINES)
def test_one_curve_and_stopping_changes_nothing(
    name: str, ranks: str, engine: tuple[str, ...], reference: Any, configs: dict[str, Path],
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    """The curve of Plain, within rounding; and stopped and continued, bit for bit its own, in rows and in weights."""
    world, stage, config = {"one": one_rank, "two": two_ranks}[ranks], stage_named(name), configs[name]
    whole = world.train(stage, config, tmp_path / "whole", *engine)
    ours = columns(whole, "step", "loss", "grad_norm", "lr")
    assert ours["step"][:_STEPS] == list(range(1, _STEPS + 1))
    theirs = columns(reference(name, *(each for each in engine if each in _SGD)), *ours)
    for key, expected in theirs.items():
        assert ours[key] == pytest.approx(expected, rel=_REL), key
    world.train(stage, config, tmp_path / "parts", *engine, "run.stop_at_step=7")
    assert columns(world.train(stage, config, tmp_path / "parts", *engine), *ours) == ours
    left, right = (load_file(tmp_path / each / "export" / "model.safetensors") for each in ("parts", "whole"))
    assert left.keys() == right.keys()
    assert all(left[each].equal(right[each]) for each in left)


BF16 = [
    pytest.param("pretrain", "one", "engine.zero=1", marks=thorough),
    pytest.param("pretrain", "two", "engine.zero=0", marks=thorough),
    pytest.param("pretrain", "two", "engine.zero=2", marks=thorough),
    pytest.param("pretrain", "two", "engine.zero=3"),
    pytest.param("distill", "two", "engine.zero=1", marks=thorough),
    pytest.param("finetune", "two", "engine.kind=accelerate", marks=thorough),
]


@pytest.mark.parametrize(("name", "ranks", "engine"), BF16)
def test_bf16_is_the_same_on_any_machine(
    name: str, ranks: str, engine: str, reference: Any, configs: dict[str, Path],
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path,
) -> None:  # fmt: skip
    """bf16 means the same everywhere: fp32 weights, products in bf16, sums over microbatches and ranks in fp32."""
    world = {"one": one_rank, "two": two_ranks}[ranks]
    settings = ("engine.precision=bf16", "batch.max_micro_size=32")
    rows = world.train(stage_named(name), configs[name], tmp_path / "run", engine, *settings)
    # ZeRO 3 rounds a product before it adds the bias: its sums are compared with its own on one rank.
    own = ("engine.kind=deepspeed", engine) if engine == "engine.zero=3" else ()
    losses, alone, fp32 = (
        columns(each, "loss")["loss"] for each in (rows, reference(name, *own, *settings), reference(name))
    )
    assert losses[:_BF16_STEPS] == pytest.approx(alone[:_BF16_STEPS], rel=_BF16_SUMS)
    assert losses == pytest.approx(fp32, rel=_BF16)
    assert losses != fp32


# Where a run of each stage goes on after so many steps: (step, ranks, engine), the first of them from step 0.
JOURNEYS = {
    "pretrain": [
        (4, "one", "engine.kind=plain"),
        (14, "two", "engine.zero=3"),
        (24, "one", "engine.zero=1"),
        (34, "two", "engine.zero=2"),
        (44, "one", "engine.kind=plain"),
    ],
    "distill": [(4, "two", "engine.zero=2"), (24, "one", "engine.zero=0"), (44, "two", "engine.zero=2")],
    "finetune": [(4, "two", _DDP), (24, "one", "engine.kind=plain"), (44, "two", _DDP)],
}


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each == "pretrain" else thorough) for each in JOURNEYS]
)
def test_a_run_moves_to_other_ranks_and_engines(
    name: str, reference: Any, configs: dict[str, Path], one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Begun on one machine and continued on others: the curve of a run that stayed on one, to rel 1e-5 in fp32.

    Every pair of engines and its moments, bit for bit: test_elastic.py.
    """
    worlds = {"one": one_rank, "two": two_ranks}
    for stop, ranks, engine in JOURNEYS[name]:
        end = () if stop == 2 * _STEPS else (f"run.stop_at_step={stop}",)
        rows = worlds[ranks].train(stage_named(name), configs[name], tmp_path / "run", engine, "epochs=2", *end)
    found, stayed = columns(rows, "step", "loss", "grad_norm"), reference(name, "epochs=2")
    assert found["step"][: 2 * _STEPS] == list(range(1, 2 * _STEPS + 1))
    for key, expected in columns(stayed, *found).items():
        assert found[key] == pytest.approx(expected, rel=_REL), key
