"""Stopped and continued is never stopped: bit for bit on the same machine, in rows and in exported weights."""

import pytest
from ranks import Ranks, stage_named
from safetensors.torch import load_file

from foveal.distributed.world import World
from foveal.door import enter, load
from foveal.errors import CheckpointError
from foveal.runtime import Run
from foveal.tracking.jsonl import read_rows

CASES = [
    ("pretrain", "one", "engine.kind=plain"),
    ("pretrain", "two", "engine.zero=0"),
    ("pretrain", "two", "engine.zero=1"),
    ("pretrain", "two", "engine.zero=2"),
    ("pretrain", "two", "engine.zero=3"),
    ("distill", "two", "engine.zero=2"),
    ("finetune", "one", "engine.kind=accelerate"),
    ("finetune", "two", "engine.kind=accelerate"),
    ("finetune", "two", "engine.kind=accelerate engine.sharding=fsdp2"),
    ("finetune", "two", "engine.kind=accelerate optim.kind=sgd optim.schedule=step optim.step_epochs=[0.5]"),
]


@pytest.mark.parametrize(("name", "ranks", "engine"), CASES)
def test_stopping_changes_nothing(name, ranks, engine, configs, one_rank, two_ranks, tmp_path) -> None:
    world: Ranks = {"one": one_rank, "two": two_ranks}[ranks]
    stage, engine = stage_named(name), engine.split()
    whole = world.train(stage, configs[name], tmp_path / "whole", *engine)
    world.train(stage, configs[name], tmp_path / "parts", *engine, "run.stop_at=7")
    world.train(stage, configs[name], tmp_path / "parts", *engine, "run.stop_at=13")
    parts = world.train(stage, configs[name], tmp_path / "parts", *engine)
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [row[key] for row in parts if key in row] == [row[key] for row in whole if key in row], key
    ours, theirs = (load_file(tmp_path / each / "export" / "model.safetensors") for each in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(ours[each].equal(theirs[each]) for each in ours)


def test_rows_after_the_checkpoint_are_void(configs, one_rank, tmp_path) -> None:
    """A kill after step 15 with the newest checkpoint at 10: steps 11 to 15 are in the file once, not twice."""
    stage, run = stage_named("pretrain"), tmp_path / "run"
    overrides = ("engine.kind=plain", "checkpoint.every=10", "checkpoint.keep=9")
    one_rank.train(stage, configs["pretrain"], run, *overrides, "run.stop_at=15")
    (newest,) = (run / "checkpoints").glob("step-00000015-*")
    next(newest.glob("*.safetensors")).write_bytes(b"torn")
    rows = one_rank.train(stage, configs["pretrain"], run, *overrides, "run.stop_at=20")
    assert [row["step"] for row in rows] == list(range(1, 21))
    whole = one_rank.train(stage, configs["pretrain"], tmp_path / "whole", "engine.kind=plain", "run.stop_at=20")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]


def test_other_science_is_refused_by_name_and_nothing_is_lost(configs, one_rank, tmp_path) -> None:
    stage, run = stage_named("pretrain"), tmp_path / "run"
    one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "run.stop_at=4")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"optim\.lr_per_256 \(was 0\.004, is 0\.008\)"):
        one_rank.train(stage, configs["pretrain"], run, "engine.kind=plain", "optim.lr_per_256=8e-3")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


MOVES = [
    ("pretrain", "one", ("engine.kind=plain",), "two", ("engine.zero=2",)),
    ("pretrain", "two", ("engine.zero=3",), "one", ("engine.zero=1",)),
    ("pretrain", "two", ("engine.zero=1",), "two", ("engine.zero=3",)),
    ("distill", "two", ("engine.zero=2",), "one", ("engine.zero=0",)),
    ("finetune", "one", ("engine.kind=accelerate",), "two", ("engine.kind=accelerate",)),
    ("finetune", "two", ("engine.kind=accelerate",), "one", ("engine.kind=plain",)),
]


@pytest.mark.parametrize(("name", "before", "engine", "after", "other"), MOVES)
def test_a_run_moves_to_other_ranks_and_engines(
    name, before, engine, after, other, configs, one_rank, two_ranks, tmp_path
) -> None:
    """Begun on one machine, continued on another, and back: the curve of the run that stayed, to rel 1e-5 in fp32.

    It is followed for 20 steps after each of the two moves.
    """
    worlds: dict[str, Ranks] = {"one": one_rank, "two": two_ranks}
    stage = stage_named(name)
    whole = worlds[before].train(stage, configs[name], tmp_path / "whole", *engine, "epochs=2")
    worlds[before].train(stage, configs[name], tmp_path / "parts", *engine, "epochs=2", "run.stop_at=4")
    worlds[after].train(stage, configs[name], tmp_path / "parts", *other, "epochs=2", "run.stop_at=24")
    parts = worlds[before].train(stage, configs[name], tmp_path / "parts", *engine, "epochs=2")
    steps = [row["step"] for row in parts if "loss" in row]
    assert steps == [row["step"] for row in whole if "loss" in row] == list(range(1, 45))
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in rows if key in row] for rows in (parts, whole))
        assert ours == pytest.approx(theirs, rel=1e-5), key


def _leave_at(world: World, config: str, overrides: list[str], step: int) -> None:
    """Fine-tune until a step, and be asked to leave there."""
    stage = stage_named("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "asked_to_leave", lambda run: run.step == step)
        enter(stage, load(stage.config, "finetune", config, overrides), world)


def test_an_evaluation_that_leaving_put_off_is_made_up_for(configs, one_rank, tmp_path) -> None:
    """Whoever is asked to leave where an evaluation is due saves and goes; the next attempt evaluates first."""
    words = ["engine.kind=plain", "evaluate_every=5"]
    alone = one_rank.train(stage_named("finetune"), configs["finetune"], tmp_path / "alone", *words)
    run = tmp_path / "run"
    one_rank.call(_leave_at, str(configs["finetune"]), [f"run.dir={run}", "tracking.uri=null", *words], 10)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl") if "val_top1" in row] == [5]
    found = one_rank.train(stage_named("finetune"), configs["finetune"], run, *words)
    for name in ("loss", "val_top1", "val_loss"):
        theirs = {row["step"]: row[name] for row in alone if name in row}
        assert {row["step"]: row[name] for row in found if name in row} == theirs
        assert sum(name in row for row in found) == len(theirs), "each once"
