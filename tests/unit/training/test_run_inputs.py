"""What every kind of run records of its data sets and models, from its plan."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import shaken
from ranks import stage_named

from foveal.atomic import read_json, sha256
from foveal.models.config import VitConfig
from foveal.models.vit import build_encoder, encoder_card
from foveal.runs.inputs import DatasetInput, ModelInput, RunInputs, read_inputs, write_inputs
from foveal.training.lineage import Fork
from foveal.training.run_inputs import collect_inputs
from foveal.weights.export import Card, read_card, write_export

OLD = Path(__file__).parents[2] / "fixtures" / "v0_1_0" / "exports"
TINY = VitConfig(name="vit_tiny_patch16_224", patch=4, width=16, depth=1, heads=2)
ANCESTRY = RunInputs("/runs/first", "pretrain", (DatasetInput("training", "own", "/data", "train", "d", 9, 9),))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of an encoder with recorded inputs and results."""
    folder = tmp_path_factory.mktemp("encoder") / "export"
    module = build_encoder(TINY, image_size=16, channels=1)
    shaken(module)
    metrics = {"loss": 0.5, "val_loss": 0.25, "val_knn_top1": 0.75, "val_nan": float("nan")}
    card = Card("pretrain", encoder_card(TINY, 16, 1), (0.3,), (0.4,), step=7, metrics=metrics)
    write_export(folder, module.state_dict(), replace(card, inputs=ANCESTRY.to_dict()))
    return folder


@pytest.fixture
def inputs_of(digits: Path, tmp_path: Path) -> Callable[..., RunInputs]:
    """The inputs of a run of a stage, by its settings."""

    def collect(stage_name: str, **settings: Any) -> RunInputs:
        stage = stage_named(stage_name)
        data = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4} | settings.pop("data", {})
        shared = {"data": data, "batch": {"global_size": 60}, "engine": {"kind": "plain"}, "epochs": 1}
        shared |= {"optim": {"warmup_epochs": 0.2}}
        cfg = stage.config_class.from_dict(shared | {"run": {"dir": str(tmp_path / "run")}} | settings, "here")
        return collect_inputs(stage_name, tmp_path / "run", stage.functions.build_plan(cfg, 1))

    return collect


def facts_of(datasets: tuple[DatasetInput, ...]) -> list[tuple[Any, ...]]:
    return [(data.role, data.name, data.split, data.num_images, data.num_used) for data in datasets]


TRAINING = ("training", "digits", "train", 1437, 1437)
EVALUATION = ("evaluation", "digits", "val", 360, 360)
VIT = {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2}


def test_pretraining(inputs_of: Callable[..., RunInputs], encoder: Path, digits: Path, tmp_path: Path) -> None:
    inputs = inputs_of("pretrain", model=VIT)
    assert (inputs.run, inputs.stage, inputs.models) == (str(tmp_path / "run"), "pretrain", ())
    assert facts_of(inputs.datasets) == [TRAINING]  # a run that evaluates nothing says so
    assert (inputs.datasets[0].path, inputs.datasets[0].num_classes) == (str(digits), 10)
    relative = inputs_of("pretrain", model=VIT, data={"path": os.path.relpath(digits)})
    assert relative.datasets == inputs.datasets  # what a lineage names is found from anywhere
    assert facts_of(inputs_of("pretrain", model=VIT, evaluate_every=5).datasets) == [TRAINING, EVALUATION]
    (init,) = inputs_of("pretrain", model=VIT, init=os.path.relpath(encoder)).models
    digest, results = sha256(encoder / "model.safetensors"), {"val_loss": 0.25, "val_knn_top1": 0.75}
    assert init == ModelInput("init", str(encoder), digest, "pretrain", 7, ANCESTRY, results)


def test_mixture(inputs_of: Callable[..., RunInputs], digits: Path) -> None:
    mix = [{"path": str(digits), "split": "val", "fraction": 0.1}, {"path": str(digits), "fraction": 0.2}]
    datasets = inputs_of("pretrain", model=VIT, data={"mix": mix}).datasets
    assert [(data.role, data.split) for data in datasets] == [
        ("training", split) for split in ("train", "val", "train")
    ]
    own, tenth, fifth = (data.num_used for data in datasets)
    assert own == 1437
    assert [round(used / (own + tenth + fifth), 1) for used in (own, tenth, fifth)] == [0.7, 0.1, 0.2]
    assert datasets[0].digest == datasets[2].digest != datasets[1].digest


def test_weights_of_others(inputs_of: Callable[..., RunInputs], encoder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights of others.pth"
    module = build_encoder(TINY, image_size=16, channels=1)
    torch.save(module.state_dict(), weights)
    (init,) = inputs_of("pretrain", model=VIT, init=str(weights)).models
    assert init == ModelInput("init", str(weights), sha256(weights), "foreign", 0)


def test_distillation_of_several_students(inputs_of: Callable[..., RunInputs], encoder: Path) -> None:
    students = [{"name": name, "model": VIT | {"width": width}} for name, width in (("small", 8), ("large", 16))]
    inputs = inputs_of("distill", teacher=str(encoder), students=students)
    assert [(model.role, model.path, model.inputs) for model in inputs.models] == [("teacher", str(encoder), ANCESTRY)]
    assert facts_of(inputs.datasets) == [TRAINING]


def test_fine_tuning(inputs_of: Callable[..., RunInputs], encoder: Path, tmp_path: Path) -> None:
    scratch = inputs_of("finetune", model=VIT)
    assert scratch.models == ()
    assert facts_of(scratch.datasets) == [TRAINING, EVALUATION]
    assert inputs_of("finetune", backbone="test_resnet", data={"image_size": 32}).models == ()
    classifier = tmp_path / "classifier"
    card = encoder_card(TINY, 16, 1, num_classes=10)
    module = build_encoder(TINY, image_size=16, channels=1, num_classes=10)
    names = tuple(map(str, range(10)))
    write_export(classifier, module.state_dict(), Card("finetune", card, (0.3,), (0.4,), classes=names))
    inputs = inputs_of("finetune", init=str(encoder), teacher={"init": str(classifier)}, pooling="token")
    assert [(model.role, model.path) for model in inputs.models] == [
        ("init", str(encoder)),
        ("teacher", str(classifier)),
    ]
    assert inputs.models[1].inputs is None  # its card has none
    few = inputs_of("finetune", init=str(encoder), data={"samples_per_class": 20})
    assert facts_of(few.datasets) == [("training", "digits", "train", 1437, 200), EVALUATION]


def test_folds_evaluate_on_training_images(inputs_of: Callable[..., RunInputs], encoder: Path) -> None:
    fold = inputs_of("finetune", init=str(encoder), data={"fold": {"of": 3, "number": 0}}).datasets
    outer = inputs_of("finetune", init=str(encoder), cross_validation={"count": 3}).datasets
    assert [(data.role, data.split) for data in fold + outer] == [("training", "train"), ("evaluation", "train")] * 2
    assert fold[0].num_used + fold[1].num_used == 1437
    assert outer[1].num_used == 1437  # all folds together
    assert {data.digest for data in fold + outer} == {fold[0].digest}


def test_comparisons_and_probes(inputs_of: Callable[..., RunInputs], encoder: Path) -> None:
    arms = {"arms": {"drawn": None, "ours": str(encoder)}, "repeats": 1, "lr_per_256": [0.1, 0.2]}
    settings = {"trials": arms, "model": VIT, "data": {"holdout_per_class": 5}}
    trials = inputs_of("finetune", **settings)
    assert [(model.role, model.path) for model in trials.models] == [("arm.ours", str(encoder))]
    probe = inputs_of("finetune", init=str(encoder), probe={"kinds": ["knn"], "k": [5]})
    assert [(model.role, model.inputs) for model in probe.models] == [("init", ANCESTRY)]


def test_what_an_older_version_or_damage_left_out_is_not_recorded(
    inputs_of: Callable[..., RunInputs], encoder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"image_size": 8, "channels": 1}
    (old,) = inputs_of("finetune", init=str(OLD / "encoder"), data=small).models
    assert (old.stage, old.step, old.inputs) == ("pretrain", 9, None)
    assert not caplog.messages
    file = encoder / "card.json"
    whole = file.read_text()
    file.write_text(json.dumps(json.loads(whole) | {"inputs": {"run": 3}}))
    try:
        (damaged,) = inputs_of("pretrain", model=VIT, init=str(encoder)).models
    finally:
        file.write_text(whole)
    assert (damaged.sha256, damaged.inputs) == (read_card(encoder).sha256, None)
    assert any("the lineage has a gap here" in message and "run" in message for message in caplog.messages)


def test_secrets_in_paths_are_left_out(
    inputs_of: Callable[..., RunInputs], encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "hunter2hunter2")
    folder = tmp_path / "hunter2hunter2"
    folder.mkdir()
    (folder / "copy").mkdir()
    for name in ("card.json", "model.safetensors"):
        (folder / "copy" / name).write_bytes((encoder / name).read_bytes())
    inputs = inputs_of("pretrain", model=VIT, init=str(folder / "copy"))
    assert "hunter2" not in json.dumps(inputs.to_dict())


def test_a_fork_looks_at_its_source_once(inputs_of: Callable[..., RunInputs], tmp_path: Path, digits: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    for folder in (source, run):
        folder.mkdir()
    write_inputs(source, ANCESTRY)
    stage = stage_named("pretrain")
    data = {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 4}
    tree = {"data": data, "batch": {"global_size": 60}, "epochs": 1, "model": VIT, "run": {"dir": str(run)}}
    plan = stage.functions.build_plan(stage.config_class.from_dict(tree, "here"), 1)
    fork = Fork(str(source), str(source), 3, "digest", 3, 3, None, None, {})
    first = collect_inputs("pretrain", run, plan.with_fork(fork))
    assert first.models == (ModelInput("fork", str(source), "digest", "pretrain", 3, ANCESTRY),)
    write_inputs(run, first)
    (source / "inputs.json").write_text("damaged")
    assert collect_inputs("pretrain", run, plan.with_fork(fork)) == read_inputs(run)
    other = collect_inputs("pretrain", run, plan.with_fork(replace(fork, digest="other")))
    assert other.models[0].inputs is None  # and the training goes on
    assert read_json(run / "inputs.json")["ancestors"]["runs"][0]["run"] == "/runs/first"
