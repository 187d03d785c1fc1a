"""``run.fork``: a new run that begins in another run's checkpoint, under other science."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from engines import gathered
from ranks import Ranks, stage_named
from torch import Tensor

from foveal.atomic import read_json, sha256, write_json
from foveal.checkpoint.saver import CheckpointSaver
from foveal.cli import app
from foveal.distributed.world import World
from foveal.errors import CheckpointError, ConfigError, TrainingDivergedError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.cli import load_config
from foveal.training.launch import run_stage
from foveal.weights.export import read_card

PLAIN = ("engine.kind=plain", "checkpoint.keep=9")


def checkpoint(run: Path, step: int) -> Path:
    return next((run / "checkpoints").glob(f"step-{step:08d}-*"))


def steps(run: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in (run / "checkpoints").glob("step-*"))


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(run, step) / "state.json").read_text())


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    """The parts ("weight", moments) that two checkpoints do not have bit for bit in common."""
    assert one.keys() >= other.keys() or one.keys() <= other.keys()
    return {key.split()[0] for key in one.keys() | other.keys() if not _equal(one.get(key), other.get(key))}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.equal(other)


def _train_and_die(world: World, config: str, overrides: list[str]) -> None:
    """Start a run that is killed while it saves its first checkpoint."""
    stage = stage_named("pretrain")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    cfg = load_config(stage.config_class, "pretrain", config, overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointSaver, "save", die)
        with pytest.raises(KeyboardInterrupt):
            run_stage(stage, cfg, world)


def _train_aloud(world: World, config: str, overrides: list[str]) -> None:
    """Train with the log level of the command line."""
    stage, logger = stage_named("pretrain"), logging.getLogger("foveal")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        run_stage(stage, load_config(stage.config_class, "pretrain", config, overrides), world)
    finally:
        logger.setLevel(before)


def log_of(ranks: Ranks, config: Path, run: Path, *overrides: str) -> str:
    """Train, and return the messages in the log of rank 0, as one line."""
    ranks.call(_train_aloud, str(config), [f"run.dir={run}", "tracking.uri=null", *PLAIN, *overrides])
    lines = (run / "logs" / "rank-000.log").read_text().splitlines()
    messages = (line.partition(": ")[2] for line in lines)
    return " ".join(" ".join(messages).split())  # a plan's lines are broken at 80 characters


@pytest.fixture(scope="module")
def source(configs: dict[str, Path], one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 22 steps that stands at step 6, with the checkpoints 0, 4 and 6. Tests only read it."""
    run = tmp_path_factory.mktemp("source") / "run"
    settings = (*PLAIN, "run.stop_at_step=6", "checkpoint.every=4", "data.ledger=true")
    one_rank.train(stage_named("pretrain"), configs["pretrain"], run, *settings)
    (run / "mlflow.json").write_text('{"run_id": "abc"}')
    return run


def test_without_a_change_it_is_the_source_bit_for_bit(
    source, configs, one_rank, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, update counter, schedule and order cross; so does what the audit reads."""
    run, stage = tmp_path / "run", stage_named("pretrain")
    settings = (*PLAIN, f"run.fork={source}@4", "data.ledger=true", "run.stop_at_step=6")
    rows = one_rank.train(stage, configs["pretrain"], run, *settings)
    assert [row["step"] for row in rows] == [5, 6]
    for step in (4, 6):
        assert not differing(gathered(checkpoint(run, step)), gathered(checkpoint(source, step)))
    assert state(run, 4)["updates"] == 4
    assert state(run, 4)["seconds"] > 0
    assert not (run / "fork").exists()
    app(["data", "audit", str(run), "--against", str(source)], standalone_mode=False)
    assert "slot by slot, in the steps 5 to 6 that both have" in capsys.readouterr().out


def test_a_distillation_forks_like_any_stage(configs, one_rank, tmp_path) -> None:
    source, run, stage = tmp_path / "source", tmp_path / "run", stage_named("distill")
    rows = one_rank.train(stage, configs["distill"], source, *PLAIN, "checkpoint.every=2", "run.stop_at_step=3")
    settings = (*PLAIN, f"run.fork={source}@2", "run.stop_at_step=3")
    assert one_rank.train(stage, configs["distill"], run, *settings)[0]["loss"] == rows[2]["loss"]


def test_longer_and_slower_it_goes_on_at_the_source_s_step(
    source, configs, one_rank, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What differs is named, the rate is the new schedule's, and the lineage stands wherever a run is looked at."""
    run, stage = tmp_path / "run", stage_named("pretrain")
    changes = ("epochs=2", "optim.lr_per_256=2e-3", "optim.max_grad_norm=0.5")
    log = log_of(one_rank, configs["pretrain"], run, f"run.fork={source}", *changes, "run.stop_at_step=8")
    rows = read_rows_without_time(run / "metrics.jsonl")
    assert not differing(gathered(checkpoint(run, 6)), gathered(checkpoint(source, 6)))
    plan = stage.functions.build_plan(stage.config_class.load(configs["pretrain"], changes), 1)
    assert [row["lr"] for row in rows] == [plan.compute_lr(step) for step in (6, 7)]
    assert f"of {source}, step 6; goes on at that step" in log
    assert f"after step 6 of 44, learning rate {plan.compute_lr(6):.3g} there" in log
    assert "epochs (was 1, is 2), optim.lr_per_256 (was 0.004, is 0.002), optim.max_grad_norm (was 1.0, is 0.5)" in log
    tags = json.loads((run / "tags.json").read_text())
    assert (tags["fork.run"], tags["fork.step"], tags["fork.mlflow_run_id"]) == (str(source), "6", "abc")
    assert "inherited.fork" in json.loads((run / "science.json").read_text())
    assert "inherited.fork" not in json.loads((source / "science.json").read_text())
    app(["attempts", str(run)], standalone_mode=False)
    told = "".join(capsys.readouterr().out.split())
    assert f"{source},step6" in told
    assert "epochs(was1,is2)" in told


def test_after_its_first_checkpoint_it_needs_no_source(configs, one_rank, source, tmp_path) -> None:
    """Killed before, it begins again in the same checkpoint, although its run has removed it; then to the export."""
    copy, run, stage = tmp_path / "copy", tmp_path / "run", stage_named("pretrain")
    shutil.copytree(source, copy)
    words = [*PLAIN, f"run.fork={copy}", "optim.lr_per_256=2e-3"]
    one_rank.call(_train_and_die, str(configs["pretrain"]), [f"run.dir={run}", "tracking.uri=null", *words])
    assert steps(run) == []
    shutil.rmtree(checkpoint(copy, 6))
    one_rank.train(stage, configs["pretrain"], run, *words, "run.stop_at_step=7")
    assert steps(run) == [6, 7]
    assert not differing(gathered(checkpoint(run, 6)), gathered(checkpoint(source, 6)))
    shutil.rmtree(copy)
    rows = one_rank.train(stage, configs["pretrain"], run, *words)
    assert [row["step"] for row in rows if "loss" in row] == list(range(7, 23))
    science = read_card(run / "export").science
    assert (science["inherited.fork.run"], science["inherited.fork.step"]) == (str(copy), 6)
    for same in (words, [*PLAIN, "optim.lr_per_256=2e-3"]):  # finished: nothing to do, with run.fork or without
        one_rank.train(stage, configs["pretrain"], run, *same)
    with pytest.raises(CheckpointError, match=rf"is a fork of {copy}, step 6, and run\.fork={source} names another"):
        one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={source}")


def test_killed_where_nothing_could_be_linked_it_forks_from_what_is_there(configs, one_rank, source, tmp_path) -> None:
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(source, copy)
    words = [*PLAIN, f"run.fork={copy}"]
    one_rank.call(_train_and_die, str(configs["pretrain"]), [f"run.dir={run}", "tracking.uri=null", *words])
    shutil.rmtree(run / "fork")
    shutil.rmtree(checkpoint(copy, 6))
    one_rank.train(stage_named("pretrain"), configs["pretrain"], run, *words, "run.stop_at_step=5")
    assert steps(run) == [4, 5]
    assert not differing(gathered(checkpoint(run, 4)), gathered(checkpoint(source, 4)))


def test_another_order_is_a_schedule_of_its_own(configs, one_rank, source, tmp_path) -> None:
    """Batches of another size: the source's steps and skipped batches are none of the fork's; its weights are."""
    copy, run, same = tmp_path / "copy", tmp_path / "run", tmp_path / "same"
    shutil.copytree(source, copy)
    file = checkpoint(copy, 6) / "state.json"
    write_json(file, read_json(file) | {"skipped": [2]})
    write_json(
        file.with_name("checksums.json"), read_json(file.with_name("checksums.json")) | {file.name: sha256(file)}
    )
    one_rank.train(stage_named("pretrain"), configs["pretrain"], same, *PLAIN, f"run.fork={copy}", "run.stop_at_step=7")
    assert state(same, 6)["skipped"] == [2]
    log = log_of(one_rank, configs["pretrain"], run, f"run.fork={copy}", "batch.global_size=32", "run.stop_at_step=2")
    assert [row["step"] for row in read_rows_without_time(run / "metrics.jsonl")] == [1, 2]
    assert not differing(gathered(checkpoint(run, 0)), gathered(checkpoint(source, 6)))
    assert (state(run, 0)["updates"], state(run, 0)["skipped"]) == (6, [])
    assert "begins at step 0 of its own schedule" in log


def test_another_optimizer_begins_with_fresh_moments(configs, one_rank, source, tmp_path) -> None:
    """SGD has other moments than AdamW; LARS has SGD's names for moments that mean something else."""
    ancestor = source
    for step, kind in ((6, "sgd"), (7, "lars")):
        run, changes = tmp_path / kind, (f"optim.name={kind}", "optim.lr_per_256=0.1")
        log = log_of(
            one_rank, configs["pretrain"], run, f"run.fork={ancestor}", *changes, f"run.stop_at_step={step + 1}"
        )
        mine, theirs = gathered(checkpoint(run, step)), gathered(checkpoint(ancestor, step))
        assert all(mine[key].equal(theirs[key]) for key in mine if key.startswith("weight "))
        assert all(not mine[key].any() for key in mine if key.startswith("momentum_buffer "))
        assert state(run, step)["updates"] == 0
        assert "its moments start at zero" in log
        ancestor = run


def test_other_shapes_are_refused_and_the_directory_is_not_spoilt(configs, one_rank, source, tmp_path) -> None:
    run, stage = tmp_path / "run", stage_named("pretrain")
    with pytest.raises(
        CheckpointError, match=r"keeps the shapes .* has decoder\.\S+ in shape \[1, 1, 16\], the model in"
    ) as met:
        one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={source}", "decoder.width=24")
    assert met.value.exit_code == 2
    one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={source}", "run.stop_at_step=7")
    assert steps(run) == [6, 7]


def test_a_torn_checkpoint_is_one_sentence(configs, one_rank, source, tmp_path) -> None:
    copy, run, stage = tmp_path / "copy", tmp_path / "run", stage_named("pretrain")
    shutil.copytree(source, copy)
    next(checkpoint(copy, 6).glob("*.safetensors")).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"step 6 of .*copy is torn or corrupt; name another step"):
        one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={copy}")
    one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={copy}@4", "run.stop_at_step=5")
    assert steps(run) == [4, 5]


def test_out_of_a_divergence_with_a_lower_rate(configs, one_rank, tmp_path) -> None:
    """The run's own sentence names the fork; the fork is trained."""
    diverged, run, stage = tmp_path / "diverged", tmp_path / "run", stage_named("pretrain")
    wild = ("optim.lr_per_256=1e30", "optim.max_grad_norm=null", "optim.warmup_epochs=0.0", "recovery.max_rollbacks=0")
    with pytest.raises(TrainingDivergedError, match=rf"run\.fork={diverged}, another run\.dir and a lower"):
        one_rank.train(stage, configs["pretrain"], diverged, *PLAIN, *wild)
    rows = one_rank.train(stage, configs["pretrain"], run, *PLAIN, f"run.fork={diverged}", "run.stop_at_step=2")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["step_applied"] for row in rows)


def test_two_ranks_of_another_engine_begin_in_the_same_checkpoint(configs, two_ranks, source, tmp_path) -> None:
    run = tmp_path / "run"
    settings = ("engine.kind=accelerate", "checkpoint.keep=9", f"run.fork={source}", "epochs=2", "run.stop_at_step=7")
    two_ranks.train(stage_named("pretrain"), configs["pretrain"], run, *settings)
    assert not differing(gathered(checkpoint(run, 6)), gathered(checkpoint(source, 6)))
    assert steps(run) == [6, 7]


def test_evaluations_cross_with_the_weights_of_the_best(configs, one_rank, tmp_path) -> None:
    """Where evaluations decide, the fork's export may be the source's best; under other data they stay behind."""
    stage, run = stage_named("finetune"), tmp_path / "run"
    stop = "early_stopping={metric: holdout_loss, patience: %d}"
    words = (*PLAIN, "evaluate_every=2", "data.holdout_per_class=4")
    one_rank.train(stage, configs["finetune"], run, *words, stop % 4, "run.stop_at_step=4")
    kept = sorted(folder.name for folder in (run / "kept").iterdir())
    for name, change, crossing in (("same", stop % 9, True), ("other", "data.eval_crop_ratio=1.0", False)):
        fork = tmp_path / name
        fork_words = (*words, stop % 4, change, f"run.fork={run}", "run.stop_at_step=5")
        one_rank.train(stage, configs["finetune"], fork, *fork_words)
        assert state(fork, 4)["scores"] == (state(run, 4)["scores"] if crossing else {})
        if crossing:
            assert kept[-1] in [folder.name for folder in (fork / "kept").iterdir()]


def test_a_fork_of_a_run_that_stopped_early_trains_and_its_card_names_both(configs, one_rank, tmp_path) -> None:
    stage, run, fork = stage_named("finetune"), tmp_path / "run", tmp_path / "fork"
    words = (*PLAIN, "evaluate_every=2", "data.holdout_per_class=4", "checkpoint.every=2", "epochs=3")
    stop = "early_stopping={metric: holdout_top1, patience: 1}"
    one_rank.train(stage, configs["finetune"], run, *words, stop, "optim.lr_per_256=1e-9")
    stopped = json.loads((run / "export/card.json").read_text())["step"]
    rows = one_rank.train(stage, configs["finetune"], fork, *words, stop, "optim.lr_per_256=1e-8", f"run.fork={run}")
    assert [row["step"] for row in rows if "loss" in row], "patience begins anew"
    card = json.loads((fork / "export/card.json").read_text())
    assert card["step"] == stopped, "the source's best is the fork's"
    assert json.loads((fork / "evaluation.json").read_text())["step"] == stopped
    assert card["science"]["inherited.fork.run"] == str(run)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("{source}@5", r"of step 5 there is none; there are the steps 0, 4, 6"),
        ("{tmp}/nowhere", r"nowhere is no run directory"),
        ("{teacher}/export", r"is an export, and a run directory is expected"),
        ("{run}", r"is the run itself"),
    ],
)
def test_what_is_no_source_is_one_sentence(setting, sentence, configs, one_rank, source, tmp_path) -> None:
    run, teacher = tmp_path / "run", configs["pretrain"].parent / "teacher"
    named = setting.format(source=source, tmp=tmp_path, teacher=teacher, run=run)
    with pytest.raises((ConfigError, CheckpointError), match=sentence) as met:
        one_rank.train(stage_named("pretrain"), configs["pretrain"], run, *PLAIN, f"run.fork={named}")
    assert met.value.exit_code == 2
    assert not run.exists()


def test_another_stage_is_one_sentence(configs, one_rank, source, tmp_path) -> None:
    with pytest.raises(ConfigError, match="is of another stage"):
        one_rank.train(stage_named("finetune"), configs["finetune"], tmp_path / "run", *PLAIN, f"run.fork={source}")


def test_nothing_left_to_train_is_one_sentence(configs, one_rank, source, tmp_path) -> None:
    done = configs["pretrain"].parent / "teacher"
    with pytest.raises(ConfigError, match="is of step 22, and this run has 22 steps, which leaves none to train"):
        one_rank.train(stage_named("pretrain"), configs["pretrain"], tmp_path / "run", *PLAIN, f"run.fork={done}")


def test_a_fresh_fork_of_the_run_it_stands_beside(configs, one_rank, source, tmp_path) -> None:
    run, stage = tmp_path / "run", stage_named("pretrain")
    shutil.copytree(source, run)
    words = (*PLAIN, f"run.fork={run}", "epochs=2", "run.stop_at_step=7")
    with pytest.raises(CheckpointError, match=r"holds a run that is no fork"):
        one_rank.train(stage, configs["pretrain"], run, *words)
    one_rank.train(stage, configs["pretrain"], run, *words, "run.fresh=true")
    assert steps(tmp_path / "run-2") == [6, 7]


def test_check_says_what_it_forks_from(configs, source, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from foveal.training.cli import main

    words = [str(configs["pretrain"]), f"run.dir={tmp_path / 'run'}", f"run.fork={source}", "epochs=2", "--check"]
    with pytest.raises(SystemExit) as met:
        main(stage_named("pretrain"), words)
    assert met.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"fork of {source}, step 6; goes on at that step" in said
    assert not (tmp_path / "run").exists()
