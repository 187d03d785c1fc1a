"""What a stop leaves in a run directory: no row twice, no other science, no evaluation forgotten.

That the curve and the weights are bit for bit those of a run that was not stopped: test_any_machine.py.
"""

import pytest
from ranks import stage_named

from foveal.cli import app
from foveal.distributed.preemption import LeaveRequest
from foveal.distributed.world import World
from foveal.errors import CheckpointError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.training.run import Run


def test_rows_after_the_checkpoint_are_void(configs, one_rank, two_ranks, tmp_path, capfd) -> None:
    """A kill after step 15 with the newest checkpoint at 10: steps 11 to 15 are in the files once, not twice.

    Two ranks that nobody killed consume the same, slot by slot.
    """
    stage, run = stage_named("pretrain"), tmp_path / "run"
    overrides = ("engine.kind=plain", "checkpoint.every=10", "checkpoint.keep=9", "data.ledger=true")
    one_rank.train(stage, configs["pretrain"], run, *overrides, "run.stop_at_step=15")
    (newest,) = (run / "checkpoints").glob("step-00000015-*")
    next(newest.glob("*.safetensors")).write_bytes(b"torn")
    rows = one_rank.train(stage, configs["pretrain"], run, *overrides, "run.stop_at_step=20")
    assert [row["step"] for row in rows] == list(range(1, 21))
    whole = one_rank.train(stage, configs["pretrain"], tmp_path / "whole", "engine.kind=plain", "run.stop_at_step=20")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    settings = ("engine.zero=1", "batch.max_micro_size=8", "data.workers=3", "data.ledger=true", "run.stop_at_step=20")
    two_ranks.train(stage, configs["pretrain"], tmp_path / "two", *settings)
    app(["data", "audit", str(run), "--against", str(tmp_path / "two")], standalone_mode=False)
    assert "slot by slot, in the steps 1 to 20 that both have" in capfd.readouterr().out


def test_other_science_is_refused_by_name_and_nothing_is_lost(configs, one_rank, tmp_path) -> None:
    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=4")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"optim\.lr_per_256 \(was 0\.004, is 0\.008\)"):
        one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "optim.lr_per_256=8e-3")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_settings_that_change_rounding_are_warned_of(configs, one_rank, tmp_path) -> None:
    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at_step=1")
    settings = (
        "engine.kind=plain",
        "engine.activation_checkpointing=true",
        "engine.precision=bf16",
        "engine.float32_matmul_precision=medium",
        "engine.max_explicit_attention_tokens=16",
    )
    for stop in (2, 3):
        one_rank.train(stage, configs["pretrain"], run, *settings, f"run.stop_at_step={stop}")
    warnings = [line for line in (run / "logs" / "rank-000.log").read_text().splitlines() if "last digits" in line]
    assert len(warnings) == 1
    assert warnings[0].endswith(
        "the checkpoint was written under other settings (engine.precision fp32 -> bf16, engine.float32_matmul_precision highest -> "
        "medium, engine.max_explicit_attention_tokens 0 -> 16); numbers may move in their last digits"
    )


def _leave_at(world: World, config: str, overrides: list[str], step: int) -> None:
    """Fine-tune until a step, and be asked to leave there."""
    stage = stage_named("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "check_preemption", lambda run, _: LeaveRequest() if run.step == step else None)
        run_stage(stage, load_config(stage.config_class, "finetune", config, overrides), world)


def test_an_evaluation_that_leaving_put_off_is_made_up_for(configs, one_rank, tmp_path) -> None:
    """Whoever is asked to leave where an evaluation is due saves and goes; the next attempt evaluates first."""
    words = ["engine.kind=plain", "evaluate_every=5"]
    alone = one_rank.train(stage_named("finetune"), configs["finetune"], tmp_path / "alone", *words)
    run = tmp_path / "run"
    one_rank.call(_leave_at, str(configs["finetune"]), [f"run.dir={run}", "tracking.uri=null", *words], 10)
    assert [row["step"] for row in read_rows_without_time(run / "metrics.jsonl") if "val_top1" in row] == [5]
    found = one_rank.train(stage_named("finetune"), configs["finetune"], run, *words)
    for name in ("loss", "val_top1", "val_loss"):
        theirs = {row["step"]: row[name] for row in alone if name in row}
        assert {row["step"]: row[name] for row in found if name in row} == theirs
        assert sum(name in row for row in found) == len(theirs), "each once"
