"""Yesterday's curve of every stage, kept in git: ``pytest --regolden`` rewrites it, and the diff is read like code."""

import json
from pathlib import Path

import pytest
from ranks import stage_named

_GOLDEN = Path(__file__).parent / "golden"
_STEPS = 20
# The curves are of the rules before 0.2, which later defaults may leave.
_OLD_RULES = {"pretrain": (), "distill": (), "finetune": ("train_sincos_positions=false",)}


@pytest.mark.parametrize("name", ["pretrain", "distill", "finetune"])
def test_golden_curve(name, configs, one_rank, tmp_path, request: pytest.FixtureRequest) -> None:
    settings = ("engine.kind=plain", f"run.stop_at_step={_STEPS}", *_OLD_RULES[name])
    rows = one_rank.train(stage_named(name), configs[name], tmp_path / "run", *settings)
    losses = [row["loss"] for row in rows]
    file = _GOLDEN / f"{name}.json"
    if request.config.getoption("--regolden"):
        file.write_text(json.dumps({"loss": losses}, indent=1) + "\n")
    golden = json.loads(file.read_text())["loss"]
    # Other processors and torch versions round otherwise; twenty AdamW steps amplify that to a few parts in 10^5.
    assert losses == pytest.approx(golden, rel=1e-4)
    assert min(losses) < losses[0]
