"""A batch that gives NaN: refused, gone back from and past, and the curve is that of a run that never had it."""

import json
from pathlib import Path

import pytest
import torch
from ranks import Ranks, enter_stage, stage_named
from safetensors.torch import load_file
from torch import Tensor

from finetune.tasks.classify import ClassificationLoss
from foveal.data.batch import Batch
from foveal.data.records.ledger import ROW_DTYPE, ledger_rows_path
from foveal.distributed.world import World
from foveal.errors import TrainingDivergedError
from foveal.tracking.jsonl import read_rows_without_time
from foveal.training.rollback import RollbackController
from pretrain.objective import MaskedModelingLoss

# Where it goes back to depends on the cadence, and what is restored there on the engine.
CASES = [
    pytest.param("one", "engine.kind=plain", 100, marks=pytest.mark.thorough),
    pytest.param("two", "engine.zero=0", 100, marks=pytest.mark.thorough),
    pytest.param("two", "engine.zero=2", 4, marks=pytest.mark.thorough),
    pytest.param("two", "engine.zero=3", 4),
]
PIXELS, FEATURES = "target=pixels", "target=features"  # without and with an EMA

EVALUATED = ("evaluate_every=6",)


def _train_poisoned(world: World, config: str, overrides: list[str], draws: list[int], steps_in_flight: int) -> None:
    """Train with an objective that is NaN on the rank whose training batch has one of ``draws``."""
    clean = MaskedModelingLoss.__call__

    def poisoned(self, model, batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, numbers = clean(self, model, batch)
        hit = torch.is_grad_enabled() and torch.isin(batch.sample_keys.cpu(), torch.tensor(draws)).any()
        return (total * float("nan") if hit else total), numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedModelingLoss, "__call__", poisoned)
        patch.setattr(RollbackController, "steps_in_flight", steps_in_flight)
        enter_stage(world, "pretrain", config, overrides)


@pytest.fixture(scope="module")
def first_draws(configs, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    """One draw of each step of an undisturbed run, from its ledger."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    one_rank.train(stage_named("pretrain"), configs["pretrain"], run, "engine.kind=plain", "data.ledger=true")
    import numpy as np

    rows = np.fromfile(ledger_rows_path(run / "ledger", 1, 0), dtype=ROW_DTYPE)
    return {int(step): int(rows["draw"][rows["step"] == step][0]) for step in set(rows["step"].tolist())}


def poison(
    ranks: Ranks,
    config: Path,
    run: Path,
    draws: list[int],
    *overrides: str,
    steps_in_flight: int = RollbackController.steps_in_flight,
) -> list[dict[str, float]]:
    overrides = (f"run.dir={run}", "tracking.uri=null", *overrides)
    ranks.call(_train_poisoned, str(config), list(overrides), draws, steps_in_flight)
    return read_rows_without_time(run / "metrics.jsonl")


def spared(ranks: Ranks, config: Path, run: Path, batches: list[int], *overrides: str) -> list[dict[str, float]]:
    """The replay: a run that is told from the start which batches no step takes."""
    run.mkdir()
    entry = {"time": 0.0, "to": 0, "refused": [], "batches": batches}
    (run / "rollbacks.jsonl").write_text(json.dumps(entry) + "\n")
    return ranks.train(stage_named("pretrain"), config, run, *overrides)


def same(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    """Rows of training are written in groups, and may come behind those of an evaluation of a later step."""
    for name in ("step", "loss", "grad_norm", "lr", "step_applied", "val_loss", "val_knn_top1"):
        left, right = (sorted((row["step"], row[name]) for row in rows if name in row) for rows in (ours, theirs))
        assert left == right, name


@pytest.mark.parametrize(("ranks", "engine", "cadence"), CASES)
def test_going_back_is_never_having_met_the_batches(
    ranks, engine, cadence, configs, first_draws, one_rank, two_ranks, tmp_path
) -> None:
    """Three bad steps in a row, wherever the newest checkpoint is: the rows are those of the replay, bit for bit.

    The evaluations after steps 6 and 12 too, of which the second is made twice: the first time after a bad step. The
    replay reads without worker processes.
    """
    world: Ranks = {"one": one_rank, "two": two_ranks}[ranks]
    bad = [first_draws[step] for step in (10, 11, 12)]
    every = f"checkpoint.every={cadence}"
    ours = poison(world, configs["pretrain"], tmp_path / "ours", bad, engine, every, "data.workers=2", *EVALUATED)
    theirs = spared(world, configs["pretrain"], tmp_path / "theirs", [9, 10, 11], engine, *EVALUATED)
    same(ours, theirs)
    assert all(row["step_applied"] for row in ours if "loss" in row)
    assert [row["step"] for row in ours if "val_loss" in row] == [6, 12, 18, 22]
    weights = [load_file(tmp_path / each / "export" / "model.safetensors") for each in ("ours", "theirs")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    refused = [json.loads(line) for line in (tmp_path / "ours" / "refused.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in refused] == [10, 11, 12]
    assert [len(set(entry["samples"])) for entry in refused] == [64, 64, 64]


@pytest.mark.parametrize(
    ("target", "steps_in_flight"),
    [
        pytest.param(target, steps, marks=() if (target, steps) == (FEATURES, 8) else pytest.mark.thorough)
        for target in (PIXELS, FEATURES)
        for steps in (0, 1, 8)
    ],
)
def test_however_late_a_refusal_is_read(target, steps_in_flight, configs, first_draws, one_rank, tmp_path) -> None:
    """Checkpoints and evaluations are due at 7, 14 and 21; 14 is in the lag of 8 behind the streak from 10 to 12."""
    bad, batches = [first_draws[step] for step in (10, 11, 12)], [9, 10, 11]
    overrides = ("engine.kind=plain", "evaluate_every=7", "log.every=7", target)
    run, late = tmp_path / "ours", steps_in_flight
    ours = poison(one_rank, configs["pretrain"], run, bad, "checkpoint.every=7", *overrides, steps_in_flight=late)
    same(ours, spared(one_rank, configs["pretrain"], tmp_path / "theirs", batches, *overrides))
    weights = [load_file(tmp_path / each / "export" / "model.safetensors") for each in ("ours", "theirs")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    (entry,) = (json.loads(line) for line in (run / "rollbacks.jsonl").read_text().splitlines())
    assert (entry["to"], entry["refused"], entry["batches"]) == (7, [10, 11, 12], batches)
    refused = [json.loads(line) for line in (run / "refused.jsonl").read_text().splitlines()]
    assert [(entry["step"], len(set(entry["samples"]))) for entry in refused] == [(10, 64), (11, 64), (12, 64)]


def test_a_lone_bad_step_is_passed_over(configs, first_draws, one_rank, tmp_path) -> None:
    rows = poison(one_rank, configs["pretrain"], tmp_path / "run", [first_draws[7]], "engine.kind=plain")
    assert [row["step"] for row in rows if "loss" in row and not row["step_applied"]] == [7]
    assert not (tmp_path / "run" / "rollbacks.jsonl").exists()


@pytest.mark.thorough
def test_no_checkpoint_after_a_refused_update(configs, first_draws, one_rank, tmp_path) -> None:
    """Due at 8, when the update is refused: written at 9."""
    overrides = ("engine.kind=plain", "checkpoint.every=8", "checkpoint.keep=9", "run.stop_at_step=14")
    poison(one_rank, configs["pretrain"], tmp_path / "run", [first_draws[8]], *overrides)
    names = sorted(folder.name[5:13] for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["00000000", "00000009", "00000014"]


def test_a_stop_at_a_refused_update_names_the_checkpoint_that_is_left(configs, first_draws, one_rank, tmp_path) -> None:
    run, overrides = tmp_path / "run", ("engine.kind=plain", "checkpoint.every=5", "run.stop_at_step=8")
    poison(one_rank, configs["pretrain"], run, [first_draws[8]], *overrides)
    end = json.loads((run / "attempts" / "0001.end.json").read_text())
    reason = (
        "stopped at step 8, whose update was refused: no checkpoint of it; the next attempt repeats the steps after 5"
    )
    assert (end["why"], end["code"], end["step"]) == (reason, 0, 8)
    assert f"WARNING foveal.training.steps: {reason}" in (run / "logs" / "rank-000.log").read_text()
    assert max(folder.name[5:13] for folder in (run / "checkpoints").iterdir()) == "00000005"


@pytest.mark.thorough
def test_giving_up_leaves_a_whole_checkpoint(configs, first_draws, two_ranks, one_rank, tmp_path) -> None:
    """Every batch from step 6 on is bad; after two roll-backs the run ends on both ranks, and can be continued."""
    bad = [draw for step, draw in first_draws.items() if step >= 6]
    overrides = ("engine.zero=1", "checkpoint.every=2", "recovery.max_rollbacks=2", "recovery.rollback_after_skips=2")
    with pytest.raises(TrainingDivergedError, match=r"in the 2 steps 6 to 7, after 2 roll-backs"):
        poison(two_ranks, configs["pretrain"], tmp_path / "run", bad, *overrides)
    rows = read_rows_without_time(tmp_path / "run" / "metrics.jsonl")
    assert max(row["step"] for row in rows) <= 7
    again = two_ranks.train(stage_named("pretrain"), configs["pretrain"], tmp_path / "run", *overrides)
    theirs = spared(
        two_ranks,
        configs["pretrain"],
        tmp_path / "theirs",
        [5, 6, 7, 8],
        "engine.zero=1",
        "recovery.rollback_after_skips=2",
    )
    same(again, theirs)


def test_a_refused_update_is_listed_once(configs, first_draws, one_rank, tmp_path) -> None:
    """A roll-back from 12 to 5 repeats step 7, and a resume at 5 again; the batches rolled back past never come again."""
    run, bad = tmp_path / "run", [first_draws[step] for step in (7, 10, 11, 12)]
    overrides = ("engine.kind=plain", "checkpoint.every=5", "checkpoint.keep=9")
    poison(one_rank, configs["pretrain"], run, bad, *overrides, "run.stop_at_step=13")
    for step in (10, 13):
        (newest,) = (run / "checkpoints").glob(f"step-{step:08d}-*")
        next(newest.glob("*.safetensors")).write_bytes(b"torn")
    poison(one_rank, configs["pretrain"], run, bad, *overrides, "run.stop_at_step=15")
    refused = [json.loads(line) for line in (run / "refused.jsonl").read_text().splitlines()]
    assert sorted((entry["step"], entry["batch"]) for entry in refused) == [(7, 6), (10, 9), (11, 10), (12, 11)]


def _finetune_without_labels(world: World, config: str, overrides: list[str], unlabelled_steps: list[int]) -> None:
    """Fine-tune with all labels ignored in some steps."""
    labelled = ClassificationLoss.batch_weight

    def batch_weight(self: ClassificationLoss, batch: Batch) -> Tensor:
        return labelled(self, batch) * (batch.step + 1 not in unlabelled_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassificationLoss, "batch_weight", batch_weight)
        enter_stage(world, "finetune", config, overrides)


def test_steps_without_a_label_are_no_refusals(configs, one_rank, tmp_path) -> None:
    """Four in a row, one of them due for a checkpoint: no roll-back, no entry, and training goes on after them."""
    run, unlabelled = tmp_path / "run", [3, 4, 5, 6]
    overrides = [f"run.dir={run}", "tracking.uri=null", "engine.kind=plain", "checkpoint.every=4", "run.stop_at_step=8"]
    one_rank.call(_finetune_without_labels, str(configs["finetune"]), overrides, unlabelled)
    rows = [row for row in read_rows_without_time(run / "metrics.jsonl") if "loss" in row]
    assert [(row["step"], row["step_applied"]) for row in rows] == [
        (step, step not in unlabelled) for step in range(1, 9)
    ]
    assert [row["loss"] == 0 for row in rows] == [step in unlabelled for step in range(1, 9)]
    assert not (run / "refused.jsonl").exists() and not (run / "rollbacks.jsonl").exists()
    assert sorted(folder.name[5:13] for folder in (run / "checkpoints").iterdir()) == ["00000004", "00000008"]
