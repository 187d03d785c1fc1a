"""evaluation.json and the pictures of a run's final evaluation: of the weights that are exported, and never in the way."""

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from ranks import Ranks, stage_named

from finetune import evaluation_record, fit
from finetune.config import FinetuneConfig
from finetune.plan import plan_training
from finetune.train import train
from foveal.distributed.preemption import LeaveRequest, Preemption
from foveal.distributed.world import World
from foveal.errors import StorageUnreachableError
from foveal.inspect import confusion
from foveal.inspect.picture import read_title_and_description
from foveal.training.lineage import Fork
from foveal.training.meters.throughput import ThroughputMeter
from foveal.training.run import Run
from foveal.training.run_directory import open_run

ALONE = World(0, 1, 0, "none", torch.device("cpu"))
CHARTS = ["calibration", "confusion", "mistakes", "per-class"]
# SGD at a rate that is too high: the best of ten evaluations is neither the first nor the last.
STOPPED = {
    "epochs": 2,
    "evaluate_every": 2,
    "early_stopping": {"metric": "val_loss", "patience": None},
    "optim": {"name": "sgd", "lr_per_256": 1.0, "warmup_epochs": 0},
}


def settings(digits: Path, run: Path, **further: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "epochs": 1,
        "data": {"path": str(digits), "image_size": 16, "channels": 1, "lanes": 10, "samples_per_class": 20},
        "model": {"name": "vit_tiny_patch16_224", "patch": 4, "width": 16, "depth": 1, "heads": 2},
        "batch": {"global_size": 20, "max_micro_size": 64},
        "optim": {"lr_per_256": 0.1, "warmup_epochs": 0},
        "engine": {"kind": "plain"},
        "run": {"dir": str(run)},
        "tracking": {"uri": None},
        "log": {"final_pictures": False, "report": False},
    } | further


def finetune(tree: dict[str, Any]) -> Path:
    plan = plan_training(FinetuneConfig.from_dict(tree, "here"), 1)
    with open_run("finetune", plan, ALONE, Preemption(ALONE)) as run:
        assert run is not None
        train(plan, run)
    return Path(tree["run"]["dir"])


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def pictures_of(run: Path, step: int) -> list[str]:
    return sorted(file.name.removesuffix(f"-{step:08d}.png") for file in (run / "pictures").glob(f"*-{step:08d}.png"))


def test_the_facts_are_those_of_the_metrics(digits: Path, tmp_path: Path) -> None:
    run = finetune(settings(digits, tmp_path / "run"))
    facts, summary = facts_of(run), json.loads((run / "finished.json").read_text())["summary"]
    assert (facts["step"], facts["split"], facts["num_images"]) == (10, "val", 360)
    assert facts["classes"] == list("0123456789")
    assert [row["class"] for row in facts["per_class"]] == facts["classes"]
    right = sum(row[number] for number, row in enumerate(facts["confusion"]))
    assert right / 360 == pytest.approx(summary["val_top1"])
    assert facts["metrics"] == {name: value for name, value in summary.items() if name in facts["metrics"]}
    assert sum(map(sum, facts["confusion"])) == 360
    assert all(row["key"].startswith("digit_") for row in facts["mistakes"])
    assert pictures_of(run, 10) == CHARTS
    title, description = read_title_and_description(run / "pictures/confusion-00000010.png")
    assert title == "Confusion matrix"
    most = facts["most_confused"][0]
    assert f"Most confused: {most['class']} taken for {most['predicted']}, {most['count']} of" in description


def test_the_best_evaluation_is_shown_and_not_the_last(digits: Path, tmp_path: Path) -> None:
    """It comes from a file beside the best weights, so that an attempt that did not evaluate it shows it, too."""
    whole = finetune(settings(digits, tmp_path / "whole", **STOPPED))
    summary, facts = json.loads((whole / "finished.json").read_text())["summary"], facts_of(whole)
    best = summary["best_step"]
    assert 2 < best < 20, "another rate is wanted"
    assert (facts["step"], facts["metrics"]["val_loss"]) == (best, summary["val_loss"])
    assert pictures_of(whole, best) == CHARTS
    assert {file.name.split("-0")[0] for file in (whole / "pictures").iterdir()} == set(CHARTS), "one picture each"
    assert not (whole / "export" / "evaluation.json").exists()
    assert not (whole / "kept").exists()

    def leave(run: Run, _: Any = None) -> LeaveRequest | None:
        return LeaveRequest() if run.step == best + 1 else None

    stopped = settings(digits, tmp_path / "stopped", **STOPPED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "check_preemption", leave)
        finetune(stopped)
    assert not (tmp_path / "stopped" / "evaluation.json").exists()
    assert facts_of(finetune(stopped)) == facts
    names = [f"{name}-{best:08d}.png" for name in CHARTS]
    same = [Image.open(whole / "pictures" / name).tobytes() for name in names]
    assert [Image.open(tmp_path / "stopped" / "pictures" / name).tobytes() for name in names] == same


def test_evaluations_during_training_collect_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[int] = []
    save = evaluation_record.save_evaluation
    monkeypatch.setattr(
        fit,
        "save_evaluation",
        lambda run, details, step, metrics: (collected.append(step), save(run, details, step, metrics)),
    )
    task = type(plan_training(FinetuneConfig.from_dict(settings(digits, tmp_path / "run"), "here"), 1).task)
    compute = task.compute_metrics_and_details
    computed: list[int] = []

    def count(self: Any, engine: Any, run: Run, step: int, **place: Any) -> Any:
        computed.append(step)
        return compute(self, engine, run, step, **place)

    monkeypatch.setattr(task, "compute_metrics_and_details", count)
    finetune(settings(digits, tmp_path / "run", evaluate_every=5))
    assert (computed, collected) == ([10], [10])


def test_what_cannot_be_drawn_is_a_warning(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no ink")

    monkeypatch.setattr(confusion, "draw_confusion", fail)
    monkeypatch.setattr(evaluation_record, "read_images_by_id", fail)
    monkeypatch.setitem(sys.modules, "foveal.inspect.calibration", None)  # as without matplotlib
    with caplog.at_level(logging.WARNING):
        run = finetune(settings(digits, tmp_path / "run"))
    assert pictures_of(run, 10) == ["per-class"]
    assert "the picture 'calibration' is not written: import of foveal.inspect.calibration" in caplog.text
    assert [record.message for record in caplog.records if "no ink" in record.message] == [
        "the picture 'confusion' is not written: no ink",
        "the picture 'mistakes' is not written: no ink",
    ]
    assert (run / "finished.json").exists()
    assert facts_of(run)["num_images"] == 360


@pytest.mark.parametrize("further", [{}, STOPPED])
def test_drawing_is_no_training(
    further: dict[str, Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Describing and drawing take a thousand seconds each here, and are subtracted once."""
    now = [0.0]

    def slowly(call: Any) -> Any:
        def take_time(*arguments: Any, **named: Any) -> Any:
            now[0] += 1000
            return call(*arguments, **named)

        return take_time

    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + now[0])
    monkeypatch.setattr(ThroughputMeter.__init__, "__defaults__", (0.0, time.perf_counter))
    for name in ("_complete_facts", "_add_sample_keys", "_draw_confusion"):
        monkeypatch.setattr(evaluation_record, name, slowly(getattr(evaluation_record, name)))
    run = finetune(settings(digits, tmp_path / "run", **further))
    assert now[0] >= 3000
    assert 0 < json.loads((run / "finished.json").read_text())["seconds"] < 500


def test_a_fork_takes_the_source_s_evaluation_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own steps may have the number of a step of the source."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "evaluation.json").write_text('{"step": 8}')
    fork = Fork(str(source), str(source), 9, "digest", 9, 9, None, None, {})
    run: Any = SimpleNamespace(plan=SimpleNamespace(fork=fork))

    def take(step: int, **changed: Any) -> Any:
        run.plan.fork = replace(fork, **changed)
        return evaluation_record._take_kept_facts(run, tmp_path / "kept.json", step)

    assert take(8) == {"step": 8}
    assert take(4) is None
    assert take(8, start_step=0) is None
    assert take(8, run=str(tmp_path / "gone")) is None
    monkeypatch.setattr(evaluation_record, "_SOURCE_SECONDS", 0.1)
    monkeypatch.setattr(evaluation_record, "read_json", lambda _: time.sleep(3))
    with pytest.raises(StorageUnreachableError):
        take(8)


def test_a_folder_in_place_of_the_file_ends_no_run(
    digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def block(run: Run, *_: Any) -> None:
        (run.path / "evaluation.json").mkdir(exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "export_weights", lambda run, *_, **__: block(run))
        run = finetune(settings(digits, tmp_path / "run"))
    assert "evaluation.json of the final evaluation is not written" in caplog.text
    assert (run / "finished.json").exists()


def test_two_ranks_write_one_record(digits: Path, two_ranks: Ranks, tmp_path: Path) -> None:
    """Each image counts once, with early stopping and without it."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(digits, tmp_path / "run", engine={"kind": "accelerate"})))
    early = "early_stopping={metric: val_loss, patience: null}"
    for name, overrides in (("last", ()), ("best", ("evaluate_every=4", early))):
        run = tmp_path / name
        two_ranks.train(stage_named("finetune"), config, run, *overrides)
        facts, summary = facts_of(run), json.loads((run / "finished.json").read_text())["summary"]
        assert sum(map(sum, facts["confusion"])) == facts["num_images"] == 360
        assert facts["num_correct"] / 360 == pytest.approx(summary["val_top1"])
        assert facts["step"] == summary.get("best_step", 10)
        assert set(CHARTS) <= set(pictures_of(run, facts["step"]))
