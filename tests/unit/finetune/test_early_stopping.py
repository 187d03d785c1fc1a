"""Metrics that are not logged and schedules that do not fit the run are refused; learning rates of the schedules."""

from pathlib import Path

import pytest
from ranks import stage_named

from foveal.errors import ConfigError
from foveal.training.cli import load_config
from foveal.training.plan import Plan

STOPPING = "early_stopping={metric: val_top1, patience: 2}"
HELD = "data.holdout_per_class=3"
NAMES = "val_top1, val_top5, val_loss"


def planned(name: str, config: Path, *overrides: str) -> Plan:
    stage = stage_named(name)
    return stage.functions.build_plan(
        load_config(stage.config_class, name, str(config), [*overrides, "engine.kind=plain"]), 1
    )


REFUSED = {
    "misspelt": (
        ("evaluate_every=5", "early_stopping={metric: val_top2, patience: 2}"),
        f"early_stopping.metric=val_top2 is not among what every evaluation logs: {NAMES}; data.holdout_per_class adds",
    ),
    "misspelt beside a holdout": (
        ("evaluate_every=5", HELD, "early_stopping={metric: top1, patience: 2}"),
        f"every evaluation logs: {NAMES}, holdout_top1, holdout_top5, holdout_loss$",
    ),
    "no holdout": (
        ("evaluate_every=5", "early_stopping={metric: holdout_top1, patience: 2}"),
        "early_stopping.metric=holdout_top1 is not among",
    ),
    "never": ((STOPPING,), f"is logged only at the end, because evaluate_every=0: .* logs {NAMES}"),
    "plateau of nothing": (
        ("optim.schedule=plateau", "evaluate_every=5"),
        f"optim.schedule=plateau follows early_stopping.metric, .* set it to one of {NAMES}",
    ),
    "descending": (
        ("optim.schedule=step", "optim.step_epochs=[0.5, 0.4]"),
        r"step_epochs=\[0.5, 0.4\] must ascend between optim.warmup_epochs=0 and epochs=1",
    ),
    "after the end": (("optim.schedule=step", "optim.step_epochs=[1.0]"), "must ascend between"),
    "in the warm-up": (
        ("optim.schedule=step", "optim.step_epochs=[0.1]", "optim.warmup_epochs=0.2"),
        "optim.warmup_epochs=0.2 and epochs=1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_a_sentence(case: str, configs: dict[str, Path]) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence) as caught:
        planned("finetune", configs["finetune"], *overrides)
    assert "\n" not in str(caught.value)


def test_when_evaluations_decide_their_cadence_is_science(configs: dict[str, Path]) -> None:
    def science(*overrides: str) -> dict[str, object]:
        return planned("finetune", configs["finetune"], *overrides).science_settings()

    assert science("evaluate_every=5") == science("evaluate_every=7")
    first, second = (science(f"evaluate_every={cadence}", STOPPING) for cadence in (5, 7))
    assert {name for name in first if first[name] != second[name]} == {"inherited.evaluate_every"}


def test_the_rate_of_a_plan(configs: dict[str, Path]) -> None:
    """22 steps, 4 of them warm-up, peak learning rate 0.01."""
    step_schedule = (
        "optim.schedule=step",
        "optim.step_epochs=[0.5, 0.75]",
        "optim.min_lr=2e-4",
        "optim.warmup_epochs=0.2",
    )
    plan = planned("finetune", configs["finetune"], *step_schedule)
    assert [plan.compute_lr(step) for step in (0, 3, 10, 11, 15, 16, 21)] == pytest.approx(
        [0.0025, 0.01, 0.01, 0.001, 0.001, 2e-4, 2e-4]
    )
    constant = planned("finetune", configs["finetune"], "optim.schedule=constant", "optim.warmup_epochs=0.2")
    assert [constant.compute_lr(step) for step in (0, 3, 21)] == pytest.approx([0.0025, 0.01, 0.01])
    plateau_schedule = (
        "optim.schedule=plateau",
        "optim.plateau_patience=2",
        "optim.step_factor=0.5",
        "evaluate_every=5",
    )
    plateau_plan = planned(
        "finetune", configs["finetune"], *plateau_schedule, "early_stopping={metric: val_loss, patience: null}"
    )
    assert plateau_plan.compute_lr(21) == pytest.approx(0.01)
    assert plateau_plan.compute_lr(21, [3.0, 2.0, 2.0, 2.5]) == pytest.approx(0.005)
    assert plateau_plan.compute_lr(21, [3.0, 2.0, 1.0, 0.5]) == pytest.approx(0.01)
