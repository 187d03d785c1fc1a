"""``foveal init``: a config that fits data, machine and time, and that a start accepts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import stage_named
from scenes import CLASSES, IGNORED, write_scenes
from teachers import DIGITS, encoder_export
from typer.testing import CliRunner

from foveal.cli import app
from foveal.commands.init import speed
from foveal.commands.init.data_facts import DataFacts, Labels, read_data_facts
from foveal.commands.init.draft import Draft
from foveal.commands.init.finetune_recipe import draft_finetuning
from foveal.commands.init.pretrain_recipe import draft_pretraining
from foveal.commands.init.recipe import Request, fit_batch
from foveal.commands.init.schedule import set_schedule
from foveal.commands.init.speed import Speed, measure_speed
from foveal.errors import ConfigError, DataError
from foveal.forecast.forecast import Forecast
from foveal.strict_yaml import parse_yaml

PHOTOGRAPHS = DataFacts(
    path="photos",
    index=None,
    num_train=3000,
    num_val=300,
    class_counts=(1000, 1000, 1000),
    image_hw=(360, 480),
    channels=3,
    pixel_stats=((0.4, 0.5, 0.6), (0.2, 0.2, 0.2)),
    has_pixel_stats=True,
    labels=(Labels("classification"),),
    images=(),
    num_looked_at=0,
)
ON_CPU = Request("pretrain", 600.0, ranks=1, on_gpu=False)
ON_GPUS = Request("pretrain", 3600.0, ranks=8, on_gpu=True)


@pytest.fixture
def constant_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_speed", lambda *_: Speed(0.25, 0.001, "a constant"))


def init(*arguments: object) -> str:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False).output


def load(stage: str, file: Path) -> Any:
    return stage_named(stage).config_class.load(file)


# --- the command ---


@pytest.mark.usefixtures("constant_speed")
def test_pretraining_takes_the_time_that_was_stated(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "mine.yaml"
    printed = init("pretrain", "--data", digits, "--minutes", 3, "--out", file).splitlines()
    cfg = load("pretrain", file)
    assert (cfg.data.channels, cfg.data.image_size, cfg.data.augment.hflip) == (1, 16, 0.0)
    seconds = cfg.epochs * (1437 // cfg.batch.global_size) * 0.25
    assert 140 < seconds < 180
    assert 0 < cfg.evaluate_every < seconds / 0.25
    assert printed[-3:] == [
        "checked   for 1 and 2 ranks",
        f"written   {file}",
        f"next      foveal train pretrain {file}",
    ]
    assert "0.25 s for a step of 64 images, a constant" in file.read_text()


@pytest.mark.usefixtures("constant_speed")
def test_a_file_is_replaced_only_by_force(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.yaml exists: give --out another name, or --force"):
        init("pretrain", "--data", digits, "--out", file)
    assert file.read_text() == "mine"
    init("pretrain", "--data", digits, "--out", file, "--force")
    first = file.read_text()
    init("pretrain", "--data", digits, "--out", file, "--force")
    assert file.read_text() == first != "mine"


@pytest.mark.usefixtures("constant_speed")
def test_nothing_is_written_that_a_start_would_refuse(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    with pytest.raises(ConfigError, match="timm"):
        init("pretrain", "--data", digits, "--model", "no_such_model", "--out", file)
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("pretend", "--data", "d"), "stage pretend does not exist"),
        (("pretrain", "--data", "d", "--teacher", "t"), "--teacher is for distill, and this is pretrain"),
        (("distill", "--data", "d", "--samples-per-class", "5"), "--samples-per-class is for finetune"),
        (("pretrain", "--data", "d", "--minutes", "5", "--hours", "1"), "exclude each other"),
        (("pretrain", "--data", "d", "--minutes", "0.1"), "a run of 6 seconds is too short"),
        (("pretrain", "--data", "d", "--gpu", "abacus"), "abacus is not known; .* b200$"),
        (("pretrain", "--data", "d", "--out", "."), "is a folder: give --out a file"),
    ],
)
def test_wrong_options_are_named_before_any_work(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        init(*arguments)


@pytest.mark.usefixtures("constant_speed")
def test_masks_become_a_segmentation(tmp_path: Path) -> None:
    file, scenes = tmp_path / "scenes.yaml", write_scenes(tmp_path / "scenes")
    init("finetune", "--data", scenes, "--out", file)
    cfg = load("finetune", file)
    assert (cfg.task, cfg.data.ignore_id, cfg.data.eval_crop_ratio) == ("segmentation", IGNORED, 1.0)
    assert cfg.data.mean is not None  # the manifest of indexed shards has none
    assert len(CLASSES) == 3


@pytest.mark.usefixtures("constant_speed")
def test_an_export_decides_model_and_image(digits: Path, tmp_path: Path) -> None:
    file, export = tmp_path / "few.yaml", encoder_export(tmp_path / "export")
    printed = init("finetune", "--data", digits, "--init", export, "--samples-per-class", 2, "--out", file)
    said = " ".join(printed.split())
    assert "1,437 images in train, 20 of them used" in said
    assert f"weights those of {export}, whose mean and std normalise the images" in said
    cfg = load("finetune", file)
    assert (cfg.model, cfg.init, cfg.data.mean) == (None, str(export), None)
    assert (cfg.data.samples_per_class, cfg.batch.global_size) == (2, 8)
    assert cfg.optim.lr_per_256 * 8 / 256 == pytest.approx(5e-4)  # of 1.5e-3 from scratch
    assert 300 < cfg.epochs * (20 // 8) < 500  # few labels: many epochs, and far from the ten minutes


@pytest.mark.usefixtures("constant_speed")
def test_a_comparison_trains_the_model_of_the_export_from_scratch_too(digits: Path, tmp_path: Path) -> None:
    file, export = tmp_path / "both.yaml", encoder_export(tmp_path / "export")
    printed = init("finetune", "--data", digits, "--init", export, "--compare", "--minutes", 3, "--out", file)
    cfg = load("finetune", file)
    assert cfg.trials.arms == {"scratch": None, "pretrained": str(export)}
    assert (cfg.trials.lr_per_256, cfg.trials.repeats, cfg.init) == ((cfg.optim.lr_per_256,), 3, None)
    assert "2 arms x 1 rate x 3 seeds = 6 runs" in printed
    assert cfg.epochs == 2 and "# 6 times 88 steps in about 2.6 minutes" in file.read_text()
    with pytest.raises(ConfigError, match="give --init EXPORT too"):
        init("finetune", "--data", digits, "--compare", "--out", tmp_path / "none.yaml")


@pytest.mark.usefixtures("constant_speed")
def test_a_student_has_a_third_of_its_teacher(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    init("distill", "--data", digits, "--teacher", encoder_export(tmp_path / "export"), "--out", file)
    cfg = load("distill", file)
    assert (cfg.method, cfg.model.width, cfg.model.depth, cfg.model.patch) == ("features", 24, 3, 4)
    teacher = encoder_export(tmp_path / "classifier", pooling="avg", classes=DIGITS)
    init("distill", "--data", digits, "--teacher", teacher, "--out", file, "--force")
    assert load("distill", file).method == "logits"


def test_a_stated_gpu_is_forecast(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forecast, "step_seconds", 0.5)  # counting the operations takes seconds
    file = tmp_path / "gpu.yaml"
    printed = init("pretrain", "--data", digits, "--gpu", "h100", "--ranks", 3, "--model", "micro", "--out", file)
    assert printed.endswith(f"next      foveal train pretrain {file} --processes 3\n")
    cfg = load("pretrain", file)
    assert (cfg.batch.global_size, cfg.engine.precision) == (192, "bf16")  # 3 ranks divide it, and 2, 4, 8 too
    assert "0.5 s for a step of 192 images, forecast for 3 x h100 at 6.5% of the peak" in file.read_text()


def test_the_model_itself_is_measured(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_MEASURED_SECONDS", 0.01)
    stage, facts, threads = stage_named("pretrain"), read_data_facts(str(digits), None), torch.get_num_threads()
    tree = parse_yaml(draft_pretraining(facts, ON_CPU).to_yaml([]))
    plan = stage.functions.build_plan(stage.config_class.from_dict(tree, "here"), 2)
    measured = measure_speed(stage, plan, facts)
    assert measured.step_seconds > 32 * measured.evaluation_seconds > 0
    assert "2 ranks of 1 thread" in measured.source
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(speed, "_measure_model", lambda *_: (1.0, 0.01, 0.6))
    assert measure_speed(stage, plan, facts).source == (
        "measured on this machine with 2 ranks of 1 thread; other programs took 60% of the time: run init again when "
        "they have ended"
    )


# --- the recipes ---


@pytest.mark.parametrize(
    ("request_", "num_train", "image_size", "patch", "model", "batch_size"),
    [
        (ON_CPU, 3000, 64, 8, "vit_tiny_patch16_224", 64),
        (ON_CPU, 50_000, 64, 16, "vit_tiny_patch16_224", 64),
        (ON_CPU, 40, 64, 8, "vit_tiny_patch16_224", 32),
        (ON_GPUS, 3000, 224, 16, "vit_tiny_patch16_224", 256),
        (ON_GPUS, 100_000, 224, 16, "vit_small_patch16_224", 1024),
        (ON_GPUS, 1_300_000, 224, 16, "vit_base_patch16_224", 4096),
    ],
)
def test_sizes_follow_data_and_hardware(
    request_: Request, num_train: int, image_size: int, patch: int, model: str, batch_size: int
) -> None:
    settings = draft_pretraining(dataclasses.replace(PHOTOGRAPHS, num_train=num_train), request_).settings
    assert (settings["data"]["image_size"], settings["model"]["patch"]) == (image_size, patch)
    assert (settings["model"]["name"], settings["batch"]["global_size"]) == (model, batch_size)


def test_a_batch_is_divided_by_many_numbers_of_ranks() -> None:
    assert [fit_batch(256, ranks) for ranks in (1, 2, 8, 3, 6, 5)] == [256, 256, 256, 192, 192, 160]
    assert fit_batch(20, 1) == 16
    assert fit_batch(1, 1) == 1


def test_images_without_labels_cannot_be_fine_tuned_on() -> None:
    facts = dataclasses.replace(PHOTOGRAPHS, labels=(), class_counts=())
    with pytest.raises(DataError, match="photos: its images have no labels to fine-tune on"):
        draft_finetuning(facts, dataclasses.replace(ON_CPU, stage="finetune"))
    with pytest.raises(ConfigError, match="--task detection does not fit the labels of photos, which allow class"):
        draft_finetuning(PHOTOGRAPHS, dataclasses.replace(ON_CPU, stage="finetune", task="detection"))


def test_without_a_validation_split_a_fold_evaluates() -> None:
    facts = dataclasses.replace(PHOTOGRAPHS, num_val=0)
    draft = draft_finetuning(facts, dataclasses.replace(ON_CPU, stage="finetune"))
    assert draft.settings["data"]["fold"] == {"of": 5, "number": 0}
    pairs = dataclasses.replace(facts, class_counts=(2, 1000, 3))
    assert draft_finetuning(pairs, dataclasses.replace(ON_CPU, stage="finetune")).settings["data"]["fold"]["of"] == 2
    with pytest.raises(DataError, match="a class of one image"):
        draft_finetuning(dataclasses.replace(facts, class_counts=(1, 9)), dataclasses.replace(ON_CPU, stage="finetune"))


def test_a_run_is_not_longer_than_helps() -> None:
    request = dataclasses.replace(ON_CPU, stage="finetune")
    length = set_schedule(Draft(), PHOTOGRAPHS, request, Speed(0.001, 0.001, ""), steps_per_epoch=4)
    assert (length.epochs, length.note) == (100, "more passes over so few labels would not help")
    length = set_schedule(Draft(), PHOTOGRAPHS, ON_CPU, Speed(100.0, 0.001, ""), steps_per_epoch=40)
    assert (length.epochs, length.note.partition(", and ")[0]) == (1, "one epoch takes longer than the budget")
    assert length.note.endswith("so few steps teach little: give it more time")  # 40


def test_a_draft_is_yaml_with_its_reasons() -> None:
    draft = Draft()
    draft.set("epochs", 3, "to begin with")
    draft.set("data.path", "a: b #", "odd")
    draft.set("data.augment", {"scale": [0.2, 1.0], "hflip": 0.0}, "x" * 100)
    draft.set("optim.lr_per_256", 4e-3, "high")
    draft.set("optim.warmup_epochs", 12.0, "long")
    draft.set("epochs", 5, "twice")
    text = draft.to_yaml(["A header."])
    assert parse_yaml(text) == draft.settings
    assert text.splitlines()[:2] == ["# A header.", "epochs: 5  # twice"]
    assert "optim: {lr_per_256: 4.0e-3, warmup_epochs: 12.0}  # high; long" in text
    assert f"  # {'x' * 100}\n  augment: " in text
