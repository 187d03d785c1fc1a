"""One curve on any machine: engines, ZeRO stages, ranks and accumulation are rounding, and rounding is small."""

from collections.abc import Callable

import pytest
from ranks import Ranks, stage_named

_STEPS = 20
_REL = 1e-5
_BF16 = (
    1e-2  # seen: 0.1 % under ZeRO 1 and 2, which keep fp32 weights whole; 0.4 % under ZeRO 3, which sends them in bf16
)

MACHINES = {
    "pretrain": [
        ("one", "engine.kind=plain", "batch.at_once=8"),
        ("one", "engine.zero=0"),
        ("one", "engine.zero=1", "batch.at_once=16"),
        ("one", "engine.zero=3"),
        ("two", "engine.zero=0"),
        ("two", "engine.zero=1", "batch.at_once=8"),
        ("two", "engine.zero=2"),
        ("two", "engine.zero=3", "batch.at_once=16"),
    ],
    "distill": [("one", "engine.zero=1"), ("two", "engine.zero=2", "batch.at_once=8")],
    "finetune": [
        ("one", "engine.kind=accelerate", "batch.at_once=16"),
        ("two", "engine.kind=accelerate"),
        ("two", "engine.kind=accelerate", "batch.at_once=8"),
        ("two", "engine.kind=accelerate", "engine.sharding=fsdp2", "batch.at_once=8"),
        ("two", "engine.kind=accelerate", "engine.sharding=deepspeed", "engine.zero=2", "batch.at_once=8"),
    ],
}


@pytest.fixture(scope="module")
def reference(
    one_rank: Ranks, configs, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, float]]]:
    """The curve of each stage under Plain, without accumulation."""
    curves = {}

    def curve(name: str) -> list[dict[str, float]]:
        if name not in curves:
            run = tmp_path_factory.mktemp("reference") / name
            overrides = ("engine.kind=plain", "batch.at_once=64", f"run.stop_at={_STEPS}")
            curves[name] = one_rank.train(stage_named(name), configs[name], run, *overrides)
        return curves[name]

    return curve


@pytest.mark.parametrize(
    ("name", "machine"), [(name, machine) for name, machines in MACHINES.items() for machine in machines]
)
def test_one_curve(name, machine, reference, configs, one_rank, two_ranks, tmp_path) -> None:
    ranks, *overrides = machine
    rows = {"one": one_rank, "two": two_ranks}[ranks].train(
        stage_named(name), configs[name], tmp_path / "run", f"run.stop_at={_STEPS}", *overrides
    )
    assert [row["step"] for row in rows] == list(range(1, _STEPS + 1))
    for key in ("loss", "grad_norm", "lr"):
        expected = [row[key] for row in reference(name)]
        assert [row[key] for row in rows] == pytest.approx(expected, rel=_REL), key


BF16 = [
    ("pretrain", "one", "engine.zero=1"),
    ("pretrain", "two", "engine.zero=0"),
    ("pretrain", "two", "engine.zero=2"),
    ("pretrain", "two", "engine.zero=3"),
    ("distill", "two", "engine.zero=1"),
    ("finetune", "two", "engine.kind=accelerate"),
]


@pytest.mark.parametrize(("name", "ranks", "engine"), BF16)
def test_bf16_is_the_same_on_any_machine(
    name, ranks, engine, reference, configs, one_rank, two_ranks, tmp_path
) -> None:
    """bf16 means the same everywhere: fp32 weights, products in bf16."""
    shared = ("engine.precision=bf16", f"run.stop_at={_STEPS}")
    stage, config = stage_named(name), configs[name]
    alone = one_rank.train(stage, config, tmp_path / "alone", "engine.kind=plain", "batch.at_once=64", *shared)
    rows = {"one": one_rank, "two": two_ranks}[ranks].train(stage, config, tmp_path / "run", engine, *shared)
    losses, plain, fp32 = ([row["loss"] for row in each] for each in (rows, alone, reference(name)))
    assert losses == pytest.approx(plain, rel=_BF16)
    assert losses == pytest.approx(fp32, rel=_BF16)
    assert losses != fp32
