"""The three stages through slurm/submit.py on this machine: what they leave, and what MLflow was told of them."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from processes import column, rows_of

from foveal.commands import summary
from foveal.models.vit import encoder_from_card
from foveal.weights.export import load_weights_strict, read_export

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]  # of real processes, each several seconds

ARMS, RATES, SEEDS = ("scratch", "pretrained"), ("0.01", "0.04"), (3, 4)
STAGES = ("pretrain", "distill", "finetune")
TRIALS = [f"{arm}-seed{seed}-lr{rate}" for arm in ARMS for rate in RATES for seed in SEEDS]


def test_every_stage_and_every_trial_is_finished(pipeline) -> None:
    assert pipeline.finished.code == 0, pipeline.finished.err
    trials = pipeline.runs / "finetune" / "trials"
    assert sorted(trial.name for trial in trials.iterdir()) == sorted(TRIALS)
    for run in (*(pipeline.runs / stage for stage in STAGES), *(trials / trial for trial in TRIALS)):
        facts = json.loads((run / "finished.json").read_text())
        assert facts["summary"], run
    numbers = json.loads((pipeline.runs / "finetune" / "finished.json").read_text())["summary"]
    for arm in ARMS:
        assert 0 <= numbers[f"{arm}_top1_lowest"] <= numbers[f"{arm}_top1"] <= numbers[f"{arm}_top1_highest"] <= 1
        assert str(numbers[f"{arm}_lr_per_256"]) in RATES


def test_a_finished_pipeline_says_so_and_does_nothing(pipeline) -> None:
    assert pipeline.again.code == 0, pipeline.again.err
    for stage in STAGES:
        assert f"runs/tiny/{stage} is finished already" in pipeline.again.err
    assert pipeline.after_again == pipeline.before_again


@pytest.mark.parametrize(("run", "stage"), [("pretrain", "pretrain"), ("distill", "distill")])
def test_an_encoders_export_is_whole(run: str, stage: str, pipeline) -> None:
    weights, card = read_export(pipeline.runs / run / "export")
    assert (card.stage, card.classes) == (stage, ())
    assert card.step == len(rows_of(pipeline.runs / run))
    assert len(card.mean) == len(card.std) == 1
    assert card.metrics["loss"] > 0
    assert card.science["seed"] == 3
    assert {"foveal", "torch", "timm"} <= card.versions.keys()
    load_weights_strict(
        encoder_from_card(card.encoder, "card.json"), weights, Path(run), new_module_prefixes=("fc_norm.", "head.")
    )


def test_a_classifiers_export_is_whole(pipeline) -> None:
    folder = pipeline.runs / "finetune" / "trials" / TRIALS[-1] / "export"
    weights, card = read_export(folder)
    assert card.classes == tuple(str(digit) for digit in range(10))
    assert card.science["inherited.init"] == read_export(pipeline.runs / "pretrain" / "export")[1].sha256
    load_weights_strict(encoder_from_card(card.encoder, "card.json"), weights, folder)


@pytest.fixture(scope="module")
def store(pipeline) -> dict[str, Any]:
    """Every run in MLflow's store by its name, and the client."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what MLflow says of its own libraries is not ours to mend
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{pipeline.folder / 'runs' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("foveal")
        assert experiment is not None
        # A stage's run is called pipeline/stage.
        found = {
            (run.info.run_name or "").removeprefix("tiny/"): run
            for run in client.search_runs([experiment.experiment_id])
        }
    return {"client": client, "runs": found}


def test_mlflow_has_a_parent_and_its_three_children(store) -> None:
    runs = store["runs"]
    assert sorted(runs) == sorted(("tiny", *STAGES, *TRIALS))
    parent = runs["tiny"].info.run_id
    assert "mlflow.parentRunId" not in runs["tiny"].data.tags
    assert {runs[stage].data.tags["mlflow.parentRunId"] for stage in STAGES} == {parent}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_mlflow_has_each_step_once(stage: str, store, pipeline) -> None:
    """Pretraining was interrupted and went on: one curve all the same."""
    run, rows = store["runs"][stage], rows_of(pipeline.runs / stage)
    assert run.data.params["optim.lr_per_256"] == "0.004"
    assert run.data.params["epochs"] == {"pretrain": "4", "distill": "1"}[stage]
    for name, stored in {"loss": "train/loss", "lr": "update/lr", "grad_norm": "update/grad_norm"}.items():
        history = sorted(store["client"].get_metric_history(run.info.run_id, stored), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == column(rows, "step")
        assert [metric.value for metric in history] == pytest.approx(column(rows, name))
    assert run.data.metrics["system/images_per_second"] > 0


def test_mlflow_has_what_came_of_the_trials(store) -> None:
    metrics = store["runs"]["finetune"].data.metrics
    assert {f"{arm}_top1" for arm in ARMS} <= metrics.keys()


def test_mlflow_has_each_trial_below_the_comparison(store, pipeline) -> None:
    runs = store["runs"]
    parent = runs["finetune"].info.run_id
    assert {runs[trial].data.tags["mlflow.parentRunId"] for trial in TRIALS} == {parent}
    for trial in TRIALS:
        rows = rows_of(pipeline.runs / "finetune" / "trials" / trial)
        history = store["client"].get_metric_history(runs[trial].info.run_id, "train/loss")
        assert sorted(metric.step for metric in history) == column(rows, "step")
        assert (runs[trial].info.status, runs[trial].data.tags["state"]) == ("FINISHED", "finished")


def test_mlflow_has_the_pictures_and_the_card(store) -> None:
    client, run = store["client"], store["runs"]["pretrain"].info.run_id
    names = ("activations", "attention", "attention-distance", "data", "features", "reconstruction")
    paths = sorted(file.path for file in client.list_artifacts(run, "pictures"))
    assert paths == [f"pictures/{name}-00000088.png" for name in names]
    assert {"card.json", "config.yaml", "finished.json"} <= {file.path for file in client.list_artifacts(run)}


def test_the_summary_has_a_line_for_each(pipeline, monkeypatch, capsys) -> None:
    monkeypatch.chdir(pipeline.folder)
    monkeypatch.setattr(sys, "argv", ["summary", "runs/tiny"])
    monkeypatch.setenv("COLUMNS", "120")
    summary.main()
    told = capsys.readouterr().out
    for word in (*STAGES, *ARMS, "2 labels a class", "2 seeds", "runs/tiny/pretrain/pictures", "runs/mlflow.db"):
        assert word in told
