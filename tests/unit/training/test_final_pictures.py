"""Pictures at the end of a run: of digits that are real, on any number of ranks, and never a reason to fail."""

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import export_encoder, export_segmenter
from ranks import Ranks, stage_named

from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.train import train
from foveal.data.config import DataConfig
from foveal.data.dataset import Dataset
from foveal.data.image.masks import MaskReader
from foveal.distributed.preemption import Preemption
from foveal.distributed.world import World
from foveal.inspect.encoder import exported
from foveal.inspect.picture import read_title_and_description
from foveal.tracking.jsonl import JsonlTracker
from foveal.training import final_pictures
from foveal.training.final_pictures import describe_training_images, draw_final_pictures
from foveal.training.run import Run
from foveal.training.run_directory import open_run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
NAMES = ["activations", "attention", "attention-distance", "data", "features"]
OF_EVALUATION = ("calibration", "confusion", "mistakes", "per-class")  # test_evaluation_record.py has them


def fine_tune(digits: Path, run_dir: Path, **log: Any) -> list[str]:
    """Fine-tune for three steps; the names of the pictures."""
    settings = {
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 8, "channels": 1, "lanes": 4, "samples_per_class": 30},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 100, "max_micro_size": 100},
        "optim": {"warmup_epochs": 0},
        "engine": {"kind": "plain"},
        "tracking": {"uri": None},
        "log": log,
        "run": {"dir": str(run_dir)},
    }
    plan = plan_training(FinetuneConfig.from_dict(settings, "here"), 1)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        train(plan, run)
    assert (run_dir / "finished.json").exists()
    return pictures_of(run_dir)


def pictures_of(run_dir: Path) -> list[str]:
    names = sorted(file.name for file in (run_dir / "pictures").glob("*"))
    return [name for name in names if not name.startswith(OF_EVALUATION)]


def test_a_run_ends_with_pictures_which_its_tracker_gets(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(JsonlTracker, "log_file", lambda _self, file: sent.append(file.name))
    names = fine_tune(digits, tmp_path / "run")
    assert names == [f"{name}-00000003.png" for name in NAMES]
    assert sent[-6] == "finished.json"  # before the pictures, for which no run starts again
    assert sorted(sent[-5:]) == names
    words = {name: read_title_and_description(tmp_path / "run" / "pictures" / name) for name in names}
    title, text = words["data-00000003.png"]
    assert title == "Training images"
    assert text.startswith(
        "Some of the 1,437 images of digits, split train, of 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9. "
    )
    assert text.endswith("The largest class, 3, has 147 images, the smallest, 8, 138.")
    assert "6 rows, one per image; columns: image, block 1." in words["features-00000003.png"][1]


def test_a_setting_leaves_them_out(digits: Path, tmp_path: Path) -> None:
    assert fine_tune(digits, tmp_path / "run", final_pictures=False) == []


def test_a_run_inside_another_has_none(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "is_nested", property(lambda _self: True))
    assert fine_tune(digits, tmp_path / "run") == []


def test_a_fold_of_an_array_has_none(digits: Path, tmp_path: Path) -> None:
    """It is a run of its own there, and the run of all folds has the pictures."""
    assert fine_tune(digits, tmp_path / "folds" / "fold-1") == []


def test_a_run_that_is_asked_to_leave_draws_no_more(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished, and the signal's notice is short."""
    save = Run.save_picture

    def save_and_ask(run: Run, *picture: Any) -> None:
        save(run, *picture)
        if run.is_finished:
            run.preemption.stop_reason = "SIGTERM"

    monkeypatch.setattr(Run, "save_picture", save_and_ask)
    assert fine_tune(digits, tmp_path / "run") == ["data-00000003.png"]


def test_without_matplotlib_a_run_is_finished(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("foveal.inspect.encoder.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "data-00000003.png" in fine_tune(digits, tmp_path / "run")
    (warned,) = [text for text in caplog.messages if text.startswith("no picture of")]
    assert warned.startswith("no picture of the encoder: import of matplotlib")


def test_storage_that_hangs_is_not_waited_for(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(*_: Any) -> None:
        time.sleep(3)

    monkeypatch.setattr(final_pictures, "_READ_SECONDS", 0.1)
    monkeypatch.setattr(final_pictures, "draw_contact_sheet", hang)
    monkeypatch.setattr(final_pictures, "read_sample_images", hang)
    assert fine_tune(digits, tmp_path / "run") == []
    for what in ("the training images", "the encoder"):
        assert f"no picture of {what}: reading takes longer than 0.1 s" in caplog.messages


def fail(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")


def test_an_encoder_that_does_not_fit_is_a_warning(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exported, "load_inspected_encoder", fail)
    assert fine_tune(digits, tmp_path / "run") == ["data-00000003.png"]
    assert "no picture of the encoder: CUDA out of memory." in caplog.messages


def test_data_that_is_gone_is_a_warning(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(final_pictures, "draw_contact_sheet", fail)
    assert len(fine_tune(digits, tmp_path / "run")) == len(NAMES) - 1
    assert "no picture of the training images: CUDA out of memory." in caplog.messages


def test_pictures_that_cannot_be_written_are_warnings(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").write_text("a file")
    assert fine_tune(digits, tmp_path / "run") == []
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for name in NAMES:
        assert len([line for line in warned if f"/{name}-00000003.png is not written: " in line]) == 1


def test_no_random_number_is_drawn_and_no_export_is_no_picture(digits: Path, tmp_path: Path) -> None:
    cfg = DataConfig(path=str(digits), image_size=16, channels=3)
    dataset = Dataset.open(cfg)
    export_encoder(tmp_path / "export" / "student")
    before = torch.get_rng_state()
    assert not list(draw_final_pictures(tmp_path / "export", dataset, cfg, None, ALONE.device))
    drawn = dict(draw_final_pictures(tmp_path / "export" / "student", dataset, cfg, None, ALONE.device))
    assert sorted(drawn) == NAMES
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_that_sees_larger_images_in_windows(digits: Path, tmp_path: Path) -> None:
    cfg = DataConfig(path=str(digits), image_size=16, channels=3, eval_size=(24, 32))
    export_segmenter(tmp_path / "export")
    drawn = dict(draw_final_pictures(tmp_path / "export", Dataset.open(cfg), cfg, None, ALONE.device))
    assert sorted(drawn) == NAMES


def test_a_mask_is_not_taken_for_the_image(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, reader = DataConfig(path=str(digits), image_size=16, channels=3), MaskReader("seg.png", ("road", "car"), 255)
    seen: list[Any] = []
    monkeypatch.setattr(final_pictures, "draw_contact_sheet", lambda *given: seen.append(given[2]) or fail())
    monkeypatch.setattr(final_pictures, "read_sample_images", lambda *given: seen.append(given[4]) or fail())
    export_encoder(tmp_path / "export")
    assert not list(draw_final_pictures(tmp_path / "export", Dataset.open(cfg), cfg, reader, ALONE.device))
    assert seen == [reader, "seg.png"]


def test_data_sets_in_words(digits: Path) -> None:
    dataset = Dataset.open(DataConfig(path=str(digits), image_size=16, channels=1))

    def describe(classes: tuple[str, ...] | None) -> str:
        manifest = dataset.manifest.model_copy(update={"classes": classes})
        return describe_training_images(replace(dataset, manifest=manifest), "train")

    assert describe(None) == "Some of the 1,437 images of digits, split train; the data set has no classes."
    named = describe(tuple(f"<b>{number}" for number in range(1000)))
    assert "of 1,000 classes: <b>0, <b>1, <b>2, <b>3, <b>4, <b>5, <b>6, <b>7, <b>8, <b>9 and 990 more." in named
    assert named.endswith("the smallest, <b>10, 0.")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_other_ranks_do_not_matter(engine: str, configs: dict[str, Path], two_ranks: Ranks, tmp_path: Path) -> None:
    """Also after ZeRO 3, which replaces functions of torch for the rest of the process."""
    zero = ["engine.zero=3"] if engine == "deepspeed" else []
    stage = stage_named("pretrain")
    two_ranks.train(
        stage, configs["pretrain"], tmp_path / "run", f"engine.kind={engine}", "log.final_pictures=true", *zero
    )
    names = [name.rpartition("-")[0] for name in pictures_of(tmp_path / "run")]
    assert names == [*NAMES, "reconstruction"]


def test_photographs(tmp_path: Path) -> None:
    """Of an index beside foreign shards: CIFAR-10 has no plain shards where the tests lie, Imagenette has."""
    place = os.environ.get("FOVEAL_TEST_DATA")
    if not place:
        pytest.skip("FOVEAL_TEST_DATA is not set: there are no real images here")
    from typer.testing import CliRunner

    from foveal.cli import app

    shards = Path(place) / "imagenette224"
    result = CliRunner().invoke(app, ["data", "index", str(shards), "--index", str(tmp_path / "index")])
    assert result.exit_code == 0, result.output
    cfg = DataConfig(path=str(shards), index=str(tmp_path / "index"), image_size=16, channels=3)
    export_encoder(tmp_path / "export")
    drawn = dict(draw_final_pictures(tmp_path / "export", Dataset.open(cfg), cfg, None, ALONE.device))
    assert sorted(drawn) == NAMES
    assert drawn["data"].image.size == (8 * 134 + 6, 6 * 152 + 6)
    assert "Some of the 2,500 images" in drawn["data"].description
