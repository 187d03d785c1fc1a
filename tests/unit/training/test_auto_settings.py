"""What ``auto`` becomes in settings of the engine: of the newest checkpoint, of a fork's source, or of the device."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks, enter_stage, stage_named

from foveal.distributed.world import World
from foveal.engines import attention
from foveal.engines.config import EngineConfig
from foveal.training import auto_settings
from foveal.training.auto_settings import decide_auto_settings
from foveal.training.cli import load_config


def _train(world: World, config: str, run: str, words: list[str]) -> None:
    log = logging.getLogger("foveal")
    level = log.level
    log.setLevel(logging.INFO)
    try:
        with torch.compiler.set_stance("default", force_backend="eager"):
            enter_stage(world, "pretrain", config, [f"run.dir={run}", "tracking.uri=null", "engine.kind=plain", *words])
    finally:
        log.setLevel(level)


def _compiled_by_step(run: Path) -> list[Any]:
    states = [json.loads(file.read_text()) for file in sorted(run.glob("checkpoints/step-*/state.json"))]
    return [state["rounding"]["engine.compile"] for state in states]


def test_a_run_and_its_fork_go_on_as_they_were_trained(
    configs: dict[str, Path], one_rank: Ranks, tmp_path: Path
) -> None:
    """A run of blocks stays one under auto, on a CPU too, without a warning; a new run there compiles nothing."""
    run, fork, config = tmp_path / "run", tmp_path / "fork", str(configs["pretrain"])
    one_rank.call(_train, config, str(run), ["engine.compile=blocks", "run.stop_at_step=1"])
    one_rank.call(_train, config, str(run), ["run.stop_at_step=2", "checkpoint.keep=9"])
    one_rank.call(_train, config, str(fork), ["run.stop_at_step=3", f"run.fork={run}", "epochs=2"])
    one_rank.call(_train, config, str(tmp_path / "new"), ["run.stop_at_step=1"])
    assert _compiled_by_step(run)[-1] == "blocks"
    assert set(_compiled_by_step(fork)) == {"blocks"}
    assert set(_compiled_by_step(tmp_path / "new")) == {False}
    assert "compile: auto" in (run / "config.yaml").read_text(), "which another machine may read"
    for folder in (run, fork):
        log = (folder / "logs" / "rank-000.log").read_text()
        assert "engine.compile=auto: each transformer block, as trained before" in log
        assert "last digits" not in log


ATTENTION = "engine.max_explicit_attention_tokens"
KEPT = {True: {"engine.compile": True}, False: {"engine.compile": False}, "blocks": {"engine.compile": "blocks"}}
CASES: dict[str, tuple[dict[str, Any] | None, str, str | None, bool | str]] = {
    "a new run on a GPU": (None, "cuda", None, "blocks"),
    "a new run on a CPU": (None, "cpu", None, False),
    "a new run without a compiler": (None, "cuda", "no compiler", False),
    "of the whole model": (KEPT[True], "cpu", None, True),
    "of blocks, without a compiler": (KEPT["blocks"], "cpu", "no compiler", False),
    "eager": (KEPT[False], "cuda", None, False),
    "of a version that stored nothing": ({}, "cuda", None, False),
}


def decide(configs: dict[str, Path], rounding: dict[str, Any] | None, device: str, *overrides: str) -> EngineConfig:
    """Return a plan's engine where the newest checkpoint has these settings; None: there is none."""
    stage = stage_named("pretrain")
    words = ["run.dir=runs/none", "engine.kind=plain", *overrides]
    plan = stage.functions.build_plan(load_config(stage.config_class, "pretrain", str(configs["pretrain"]), words), 1)
    store: Any = SimpleNamespace(read_newest_rounding=lambda: rounding)
    return decide_auto_settings(plan, store, World(0, 1, 0, "none", torch.device(device))).cfg.engine


@pytest.mark.parametrize("case", CASES)
def test_auto_is_decided_by_the_checkpoint_or_the_machine(
    case: str, configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rounding, device, obstacle, expected = CASES[case]
    monkeypatch.setattr(auto_settings, "explain_no_compiler", lambda _: obstacle)
    assert decide(configs, rounding, device).compile == expected
    warning = "engine.compile=auto compiles nothing, because torch.compile does not work here (no compiler)"
    assert (warning in caplog.text) == (obstacle is not None)


def test_a_stated_value_stays(configs: dict[str, Path]) -> None:
    assert decide(configs, KEPT[False], "cpu", "engine.compile=blocks").compile == "blocks"
    assert decide(configs, KEPT[False], "cpu", f"{ATTENTION}=64").max_explicit_attention_tokens == 64


@pytest.mark.parametrize(
    ("rounding", "amx", "expected"),
    [
        pytest.param(None, True, 512, id="a new run"),
        pytest.param({"engine.compile": False}, True, 0, id="of a version that had the fused kernel"),
        pytest.param({ATTENTION: 0}, True, 0, id="of such a run, one attempt later"),
        pytest.param({ATTENTION: 512}, True, 512, id="on the same hardware"),
        pytest.param({ATTENTION: 512}, False, 0, id="on other hardware"),
    ],
)
def test_attention_goes_on_unless_the_hardware_changes(
    rounding: dict[str, Any] | None,
    amx: bool,
    expected: int,
    configs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    assert decide(configs, rounding, "cpu", "engine.precision=bf16").max_explicit_attention_tokens == expected
