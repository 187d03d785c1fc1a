"""The table of optimizers: whoever trains, saves, forecasts or refuses reads a row, so a row is all a new one needs."""

from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from engines import OPTIM, Shape, Tiny, Trainer, gathered

from foveal.distributed.world import World
from foveal.engines.build import check_engine_config
from foveal.engines.config import EngineConfig
from foveal.errors import ConfigError
from foveal.forecast.memory import estimate_memory
from foveal.forecast.trace import MemoryTrace, count_parameters
from foveal.optim.config import OptimConfig
from foveal.optim.guard import GuardedOptimizer
from foveal.optim.moments import UpdateRule
from foveal.optim.optimizers import OPTIMIZERS, OptimizerSpec, parameter_groups
from foveal.training.loop import TrainingSetup

ALONE = World(0, 1, 0, "none", torch.device("cpu"))


class Signs(torch.optim.Optimizer):
    """The sign of an average of gradients."""

    def __init__(self, param_groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(param_groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("sign_average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 0.1)
                parameter.sub_(average.sign(), alpha=group["lr"])


class GuardedSigns(GuardedOptimizer, Signs):
    def __init__(self, param_groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        super().__init__(param_groups, cfg.lr_per_256)
        self.max_grad_norm = cfg.max_grad_norm


SIGNS = OptimizerSpec(
    GuardedSigns,
    lambda _cfg: UpdateRule(("sign_average",)),
    unsupported={"fsdp2": "is a toy for whole weights", "deepspeed": "is no optimizer of DeepSpeed's"},
)


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> OptimConfig:
    """The settings of an optimizer that only a row of the table knows of."""
    monkeypatch.setitem(OPTIMIZERS, "signs", SIGNS)
    return OPTIM.model_copy(update={"name": "signs"})


def test_a_row_trains_and_continues_bit_for_bit(signs: OptimConfig, tmp_path: Path) -> None:
    shape = Shape(1, "plain", optim=signs.name)
    trainer, resumed = Trainer(ALONE, shape), Trainer(ALONE, shape)
    initial = [value.clone() for value in trainer.module.parameters()]
    trainer.steps(0, 3)
    trainer.save(tmp_path)
    assert {name.partition(" ")[0] for name in gathered(tmp_path)} == {"weight", "sign_average"}
    resumed.load(tmp_path, 3)
    assert resumed.steps(3, 7) == trainer.steps(3, 7)
    assert resumed.engine.num_updates == 7
    moved = [not now.equal(was) for now, was in zip(trainer.module.parameters(), initial, strict=True)]
    assert moved == [value.requires_grad for value in trainer.module.parameters()]


def test_a_row_is_refused_where_it_says(signs: OptimConfig) -> None:
    def check(**settings: Any) -> None:
        check_engine_config(EngineConfig(**settings), signs, 2, microbatch_size=1, accumulation_steps=1)

    check(kind="accelerate")
    with pytest.raises(
        ConfigError, match=r"optim\.name=signs is a toy for whole weights; use engine\.sharding=ddp, or"
    ):
        check(kind="accelerate", sharding="fsdp2")
    with pytest.raises(ConfigError, match=r"optim\.name=signs is no optimizer of DeepSpeed's; use .*sharding=ddp$"):
        check()


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "signs"])
def test_the_forecast_counts_what_an_optimizer_keeps(kind: str, signs: OptimConfig) -> None:
    optim, trainer = signs.model_copy(update={"name": kind}), Trainer(ALONE, Shape(1, "plain", optim=kind))
    trainer.step(0)
    engine: Any = trainer.engine
    kept = sum(value.nbytes for state in engine._guard.state.values() for value in state.values() if value.ndim)
    counts = count_parameters(
        lambda _device: TrainingSetup(model := Tiny(), parameter_groups(model, optim), cast(Any, None)), optim
    )
    cfg, trace = EngineConfig(kind="plain"), MemoryTrace({0: 0})
    assert estimate_memory(counts, trace, cfg, optim, world_size=1, accumulation_steps=1).moments == kept > 0


def test_rows_are_the_kinds_of_the_settings() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimConfig.model_fields["name"].annotation))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_deepspeed_gets_what_it_can_build(kind: str) -> None:
    spec = OPTIMIZERS[kind]
    assert (spec.build_unguarded is None) == ("deepspeed" in spec.unsupported)
    if spec.build_unguarded is not None:
        assert spec.matrix_rule is None, "the groups of DeepSpeed's partitions have one rule"
